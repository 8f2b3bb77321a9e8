"""Every policy on exact traces."""
