"""Compiling ahead of time for devices that are only described, and reading what the compiler says of the program."""
