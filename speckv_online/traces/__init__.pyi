from .trace import Trace as Trace
from .trace import load_traces as load_traces
