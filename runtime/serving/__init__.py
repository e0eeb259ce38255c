"""A server for one machine."""
