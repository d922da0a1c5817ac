"""The methods, a file each, named like the paper.  Importing this package registers all of them."""

from kvlib.policies.base import BudgetedEvictor, Evictor, HeadSplit, Method, Needs, RecipeError, View, register
from kvlib.policies.evict.h2o import H2O, H2OPrefill
from kvlib.policies.evict.snapkv import SnapKV
from kvlib.policies.evict.streaming_llm import StreamingLLM
from kvlib.policies.heads.duo_attention import DuoAttention
from kvlib.policies.heads.table import HeadTable

__all__ = [
    "H2O",
    "BudgetedEvictor",
    "DuoAttention",
    "Evictor",
    "H2OPrefill",
    "HeadSplit",
    "HeadTable",
    "Method",
    "Needs",
    "RecipeError",
    "SnapKV",
    "StreamingLLM",
    "View",
    "register",
]
