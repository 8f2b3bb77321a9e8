"""Collecting exact traces and the seconds of steps."""
