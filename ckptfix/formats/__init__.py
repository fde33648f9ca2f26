"""One file is one container: a `table`, and a module for each, whose docstring is the format.

Uses `bytes`, `tree`, `pickles` and `contents`.
"""
