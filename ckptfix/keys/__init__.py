"""Names: what becomes of keys, what wrappers add to them, which prefixes fit a target.

Pure functions of lists of keys; uses `errors` and `hints` only.
"""
