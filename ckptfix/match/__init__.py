"""A state dict and a target: which one is meant, under which names, whether it loads, and why not.

Uses `contents`, `keys` and `diffs`; a target that is a file comes in by the `door`.
"""
