"""A model repository for NVIDIA Triton: written from a bundle, checked before Triton reads it, and what runs in it."""
