"""SpecKV's published evaluation, made again."""
