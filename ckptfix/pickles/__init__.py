"""Pickles as data: read into a tree and written from one, without importing what they name."""

from ckptfix.pickles.reader import read
from ckptfix.pickles.writer import write

__all__ = ["read", "write"]
