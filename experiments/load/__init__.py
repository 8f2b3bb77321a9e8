"""Policies inside a serving engine under load, driven by the engine's own load generator."""
