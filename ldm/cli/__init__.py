"""Flags of the commands, and the dataclasses that they become. Imports no torch.

    parser.py       the argument parser and number types of all commands
    other_tools.py  what takes the place of the flags of other tools
    training.py     the flags of main.py
    generation.py   the flags of the generation scripts
"""
