"""One file for each command, named `<command>_command.py`, imported when it is called."""
