"""The command line: what each command does over the engine, and how settings are read from flags and TOML files.

Gives `__main__` a function for each command, flags for every setting, the parser with its help and its errors, the
listener that shows events in a terminal, and the wording of settings in errors. A command is added by its function here
and its line in `__main__.COMMANDS`.
"""
