"""The command line, one file a command; `main` says what a command is."""
