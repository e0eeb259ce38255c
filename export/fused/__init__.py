"""The fused network: the trained function in fewer and larger operations, for engines."""
