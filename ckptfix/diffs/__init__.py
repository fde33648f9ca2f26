"""How two checkpoints differ: `documents` pairs keys and walks both, `values` compares tensors.

Uses `contents`, `keys` and `edit`; reads, and writes nothing.
"""
