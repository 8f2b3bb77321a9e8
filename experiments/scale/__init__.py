"""Many workers and one learner."""
