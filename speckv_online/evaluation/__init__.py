"""SpecKV's published evaluation, made again and corrected."""
