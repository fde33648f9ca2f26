"""Repairs: what makes a checkpoint load, and what can be saved from a damaged one.

Uses `match` and `edit` for the one, the `door` for the other. The command line only writes what is
planned here.
"""
