from .pairs import LoadedPair as LoadedPair
from .pairs import chat_prompt as chat_prompt
from .pairs import list_pairs as list_pairs
from .pairs import load_pair as load_pair
from .pairs import load_target as load_target
from .pairs import load_tokenizer as load_tokenizer
from .pairs import prepare as prepare
