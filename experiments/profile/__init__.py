"""Collecting exact traces."""
