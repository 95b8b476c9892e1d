"""What is trained, and the loop that trains it."""

__version__ = "0.1.0"
