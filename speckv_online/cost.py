"""The former place of :mod:`speckv_online.simulate.cost_table`."""

from speckv_online.simulate.cost_table import CostTable, LevelCost, fit_cost, load_cost

__all__ = ["CostTable", "LevelCost", "fit_cost", "load_cost"]
