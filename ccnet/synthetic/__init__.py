"""Synthetic videos: annotations and features with known events."""
