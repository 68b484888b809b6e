"""The command line: one module per command. `main` describes what such a module must have."""
