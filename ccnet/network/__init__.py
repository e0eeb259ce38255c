"""The CCNet network in PyTorch, and the import of released weights."""
