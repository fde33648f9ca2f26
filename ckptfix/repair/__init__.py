"""Repairs: what makes a checkpoint load, and what can be saved of a damaged one."""
