"""torch's side: described tensors made real, and real ones described.

The only room that imports torch when it is imported, so it is imported late. Uses `contents`.
"""
