"""Runs over a corpus: planned, sharded, resumable."""
