"""Wrappers that keep a policy from doing harm."""
