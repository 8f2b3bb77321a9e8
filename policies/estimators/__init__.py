"""Estimators that policies share."""
