"""Synthetic videos: annotations drawn from the statistics of UnAV-100, and features with known events."""
