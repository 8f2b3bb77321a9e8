from .decoder import SpeculativeDecoder as SpeculativeDecoder
from .generation import Generation as Generation
from .generation import Totals as Totals
from .hf_assistant import PolicyAssistant as PolicyAssistant
