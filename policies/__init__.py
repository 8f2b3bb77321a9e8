"""Speculation-length policies: numpy, and river for some, usable without the rest of the project."""
