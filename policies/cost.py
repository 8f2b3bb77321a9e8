"""The former place of :mod:`policies.costs.cost_model`."""

from policies.costs.cost_model import CostModel, split_levels

__all__ = ["CostModel", "split_levels"]
