"""Tensors in pieces: boxes that tile a shape, which is proved, and joined into one storage again.

A checkpoint of several processes keeps each tensor as boxes: offset and size in every dimension of
the whole. `boxes` proves that they tile it, `joining` makes a tensor of them, and `scattered` reads
those that do not lie one after another. No weight is read before a writer asks for it.
"""
