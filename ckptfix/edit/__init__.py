"""Documents in, other documents over the same bytes out; and edits inside the file itself.

Uses `contents` and `keys`; `inplace` reads back what it wrote by the `door`.
"""
