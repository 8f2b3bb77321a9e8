from .cost_table import CostTable as CostTable
from .cost_table import LevelCost as LevelCost
from .cost_table import load_cost as load_cost
from .simulator import Replay as Replay
from .simulator import Simulator as Simulator
