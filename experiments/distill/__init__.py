"""Distil the default draft: ``python -m experiments.distill`` (stages: generate, train, export)."""
