"""The methods, a file each, named like the paper.  Importing this package registers all of them."""

from kvlib.policies.base import BudgetedEvictor, Evictor, HeadSplit, Method, Needs, RecipeError, View, register
from kvlib.policies.codec.gear import Gear, GearL
from kvlib.policies.codec.hierarchical import Hierarchical
from kvlib.policies.codec.kivi import Kivi
from kvlib.policies.codec.kv import KV, KV4, KV8
from kvlib.policies.codec.lossless import Lossless
from kvlib.policies.codec.mustafar import Mustafar
from kvlib.policies.codec.rotated import Rotated
from kvlib.policies.codec.shadowkv import Landmarks, LowRank, ShadowKV
from kvlib.policies.encoding import Codec
from kvlib.policies.evict.h2o import H2O, H2OPrefill
from kvlib.policies.evict.random_eviction import RandomEviction
from kvlib.policies.evict.snapkv import SnapKV
from kvlib.policies.evict.streaming_llm import StreamingLLM
from kvlib.policies.evict.window import AccLLM, Window
from kvlib.policies.heads.duo_attention import DuoAttention
from kvlib.policies.heads.table import HeadTable
from kvlib.policies.select.clusterkv import ClusterKV
from kvlib.policies.select.double_sparsity import DoubleSparsity
from kvlib.policies.select.lserve import LServe
from kvlib.policies.select.oracle import Oracle
from kvlib.policies.select.quest import Quest
from kvlib.policies.select.sentencekv import SentenceKV
from kvlib.policies.select.tokenselect import TokenSelect
from kvlib.policies.selection import Selector
from kvlib.policies.tier.host import Host

__all__ = [
    "H2O",
    "KV",
    "KV4",
    "KV8",
    "AccLLM",
    "BudgetedEvictor",
    "ClusterKV",
    "Codec",
    "DoubleSparsity",
    "DuoAttention",
    "Evictor",
    "Gear",
    "GearL",
    "H2OPrefill",
    "HeadSplit",
    "HeadTable",
    "Hierarchical",
    "Host",
    "Kivi",
    "LServe",
    "Landmarks",
    "Lossless",
    "LowRank",
    "Method",
    "Mustafar",
    "Needs",
    "Oracle",
    "Quest",
    "RandomEviction",
    "RecipeError",
    "Rotated",
    "Selector",
    "SentenceKV",
    "ShadowKV",
    "SnapKV",
    "StreamingLLM",
    "TokenSelect",
    "View",
    "Window",
    "register",
]
