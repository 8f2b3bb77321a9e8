"""The former place of :mod:`speckv_online.simulate.hindsight`."""

from speckv_online.simulate.hindsight import best_fixed, clairvoyant
from speckv_online.simulate.hindsight import dynamic_programming_bound as fastest

__all__ = ["best_fixed", "clairvoyant", "fastest"]
