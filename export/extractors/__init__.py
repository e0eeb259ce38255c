"""Networks that turn video into features, as engines."""
