"""speckv_online: an online-learning bandit controller for speculative decoding."""

__version__ = "0.2.0"
