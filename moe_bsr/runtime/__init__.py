"""Access to the machine and the process: device, memory, files, signals, random numbers, several processes."""
