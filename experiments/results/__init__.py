"""The comparison on the clock."""
