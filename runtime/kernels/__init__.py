"""Compiled loops in C: what NumPy can't express, without the interpreter lock."""
