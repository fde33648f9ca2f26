"""Where bytes lie, how they are copied, places, and files that are whole or not there.

Knows nothing of checkpoints. Uses `errors`, `hints` and `words` only.
"""
