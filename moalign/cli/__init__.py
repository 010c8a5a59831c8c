"""The command line: one file per verb, which parses, calls one function and prints.

Nothing heavy is imported before a command's body runs, so that ``moalign --help`` answers at once.
"""
