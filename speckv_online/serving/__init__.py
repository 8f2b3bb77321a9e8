"""Our policies inside engines that serve many requests at once."""
