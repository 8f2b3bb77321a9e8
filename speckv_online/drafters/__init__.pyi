from .base import Drafter as Drafter
from .hybrid import HybridDrafter as HybridDrafter
from .model import ModelDrafter as ModelDrafter
from .ngram import NgramDrafter as NgramDrafter
from .spec import parse_drafter as parse_drafter
