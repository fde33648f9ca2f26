"""Documents in, other documents over the same bytes out; and edits inside the file itself.

Uses `contents`, `keys` and `torch_bridge`, which computes; `inplace` reads back what it wrote.
"""
