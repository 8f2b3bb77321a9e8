"""Published methods and those of other engines."""
