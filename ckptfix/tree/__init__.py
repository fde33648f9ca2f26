"""What a checkpoint holds, without the weights: described tensors, documents, walks through them.

Uses `bytes`, since a storage knows the spans in which its bytes lie, and the tables on the ground.
"""
