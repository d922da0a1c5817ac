"""The methods, a file each, named like the paper.  Importing this package registers all of them."""

from kvlib.policies.base import BudgetedEvictor, Evictor, HeadSplit, Method, Needs, RecipeError, Selector, View, register
from kvlib.policies.evict.h2o import H2O, H2OPrefill
from kvlib.policies.evict.random_eviction import RandomEviction
from kvlib.policies.evict.snapkv import SnapKV
from kvlib.policies.evict.streaming_llm import StreamingLLM
from kvlib.policies.heads.duo_attention import DuoAttention
from kvlib.policies.heads.table import HeadTable
from kvlib.policies.select.oracle import Oracle

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
    "Oracle",
    "RandomEviction",
    "RecipeError",
    "Selector",
    "SnapKV",
    "StreamingLLM",
    "View",
    "register",
]
