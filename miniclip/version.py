"""The version, in a room below all others, so that any of them may record it."""

__version__ = "0.1.0"
