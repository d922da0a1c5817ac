"""kvlib keeps the KV cache of long-context language models small, and says exactly what it gave up."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed
from typing import TYPE_CHECKING, Any

from kvlib._version import __version__
from kvlib.policies.base import RecipeError, register
from kvlib.recipe import Recipe, methods

if TYPE_CHECKING:
    from kvlib.eval import evaluate
    from kvlib.hf import Cache, CapturedDecode, detach, generate_speculative, patch


__all__ = [
    "Cache",
    "CapturedDecode",
    "Recipe",
    "RecipeError",
    "__version__",
    "detach",
    "evaluate",
    "generate_speculative",
    "methods",
    "patch",
    "register",
]

OLDEST_TRANSFORMERS = (5, 17)


def _transformers_problem() -> str | None:
    """Why the transformers front door cannot open, or None."""
    try:
        found = _installed("transformers")
    except PackageNotFoundError:
        return "transformers is not installed: pip install 'transformers>=5.17'"
    if tuple(int(x) for x in found.split(".")[:2]) < OLDEST_TRANSFORMERS:
        return f"transformers {found} is too old: pip install 'transformers>=5.17'"
    return None


def __getattr__(name: str) -> Any:
    if name in ("Cache", "CapturedDecode", "detach", "evaluate", "generate_speculative", "patch"):
        problem = _transformers_problem()
        if problem:
            raise ImportError(f"kvlib.{name}: {problem}")
        return getattr(import_module("kvlib.eval" if name == "evaluate" else "kvlib.hf"), name)
    raise AttributeError(f"module 'kvlib' has no attribute {name!r}")


# Registers the name "kvlib" for from_pretrained(attn_implementation="kvlib"); touches nothing that exists.
if _transformers_problem() is None:
    import kvlib.hf  # noqa: F401
