"""Train CCNet as the paper says."""
