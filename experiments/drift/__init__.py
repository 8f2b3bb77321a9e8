"""A change of task, level or draft in the middle of a run."""
