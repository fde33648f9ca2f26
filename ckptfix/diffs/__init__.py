"""Two checkpoints held against each other: documents, and the values of tensors."""
