"""Measure engines and the host path on this machine."""
