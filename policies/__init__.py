"""Speculation-length policies: numpy, river and torch only, usable without the rest of the project."""
