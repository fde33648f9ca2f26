"""Several files are one checkpoint: how they are found, read as one, and written.

Uses `formats`, which read each file.
"""
