"""Training as in the paper: data, targets, losses, optimisation, a loop that resumes exactly, validation."""
