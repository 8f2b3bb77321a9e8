"""Learning what steps take."""
