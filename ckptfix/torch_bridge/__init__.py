"""torch's side: described tensors made real, and real ones described. Imports torch."""
