"""kvlib inside Hugging Face transformers, by its public hooks: the only folder that knows that library.

A `Cache` subclass parks new keys and values in `update()`; the attention function registered as "kvlib" finds them by a
handle on the key tensor, where queries, scale and padding mask are known, and lets the layer take them in.
"""

from kvlib.hf.attach import detach
from kvlib.hf.cache import Cache, patch
from kvlib.hf.graph import CapturedDecode
from kvlib.hf.probe import induction_gates
from kvlib.hf.prompt import Prompt
from kvlib.hf.speculate import Speculation, generate_speculative

__all__ = ["Cache", "CapturedDecode", "Prompt", "Speculation", "detach", "generate_speculative", "induction_gates", "patch"]
