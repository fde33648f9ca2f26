"""Where bytes lie, how they are copied, and files that are whole or not there.

Knows nothing of checkpoints. Uses `errors` only.
"""
