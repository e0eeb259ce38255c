"""Compiled loops: the only place of numba."""
