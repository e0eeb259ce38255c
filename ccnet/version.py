"""The version: the one place that says it. It stands below everything that notes it in a file."""

__version__ = "0.3.0"
