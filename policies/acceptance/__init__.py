"""Predicting whether each drafted token will be accepted."""
