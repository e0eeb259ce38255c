"""One run that builds, verifies and times everything on a GPU machine."""
