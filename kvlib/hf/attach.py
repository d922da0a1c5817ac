"""Attaching a model to kvlib's attention, and giving it back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kvlib.hf.functions import NAME


@dataclass
class Attachment:
    """What kvlib changed on one model, so that `detach` can undo it."""

    previous: str
    hook: Any = None
    generate: bool = False
    rotary: Any = None  # its rotary embedding, once a codec has asked for it
    drafts: Any = None  # the hook that counts drafts for caches under assisted decoding


attached: weakref.WeakKeyDictionary[PreTrainedModel, Attachment] = weakref.WeakKeyDictionary()


def attach(model: PreTrainedModel, take_ids: Callable[..., None] | None = None) -> None:
    """Let `model` attend through kvlib; `take_ids` becomes the one forward pre-hook of its base model, if it has none."""
    state = attached.get(model)
    if state is None:
        state = Attachment(str(text_config(model)._attn_implementation))
    if text_config(model)._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
        if text_config(model)._attn_implementation != NAME:
            family = model.config.model_type
            raise ValueError(f"kvlib does not support the family {family!r}: it does not dispatch its attention")
    attached[model] = state
    if take_ids is not None and state.hook is None:
        state.hook = model.base_model.register_forward_pre_hook(take_ids, with_kwargs=True)


def detach(model: PreTrainedModel) -> None:
    """Give the model back the attention it had and remove every hook.  Idempotent.

    An uncompressed cache still works afterwards; a compressed one raises RuntimeError naming the remedy.
    """
    state = attached.pop(model, None)
    if state is None:
        return
    for hook in (state.hook, state.drafts):
        if hook is not None:
            hook.remove()
    if state.generate:
        del model.generate
    model.set_attn_implementation(state.previous)


def text_config(model: PreTrainedModel) -> Any:
    """The configuration its decoder's attention modules read, live."""
    return model.config.get_text_config(decoder=True)
