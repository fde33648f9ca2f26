"""Is it damaged, what is wrong with it, what does this error mean.

`damage` reads every byte and compares the checksums; `document` looks at what a checkpoint holds,
without reading weights; `explain` knows the texts of errors. Uses `contents`, `keys`, `edit` and
the `door`; changes nothing and writes nothing.
"""
