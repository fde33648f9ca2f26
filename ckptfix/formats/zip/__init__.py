"""Zip archives: how they are laid out, read strictly, written, and searched where damaged."""
