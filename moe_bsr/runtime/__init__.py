"""What is known of the machine and the process: device, memory, files, signals, random numbers."""
