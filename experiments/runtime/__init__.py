"""Workers, the learner, and the work they share; Ray wraps it thinly."""
