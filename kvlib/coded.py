"""Single tokens as bytes: what an evictor's tiles hold under a codec that encodes every token alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvlib.kernels.attention import Partial, Visible
from kvlib.policies.encoding import Form, Reading, Stored, Tokens, attend, attend_in_place, prepared

if TYPE_CHECKING:
    from kvlib.segment import Spec


@dataclass(frozen=True)
class Coding:
    """How tokens are bytes: the forms of keys and values, which were vectors of sizes d and dv of a type."""

    forms: tuple[Form, Form]
    d: int
    dv: int
    dtype: torch.dtype

    def write(self, which: str, x: Tensor) -> Tensor:
        """Keys ("k") or values ("v") x [N, d] as bytes [N, bytes]: the parts of each token, one after the other."""
        form = self.forms["kv".index(which)]
        parts = form.encode(_tokens(x))
        return torch.cat([parts[name].flatten(3)[0, 0].contiguous().view(torch.uint8) for name in form.spans], 1)

    def vectors(self, which: str, coded: Tensor) -> Tensor:
        """Keys or values [G, P, d] of bytes [G, P, bytes], in the type they had."""
        form, stored = self.forms["kv".index(which)], self._stored(which, coded)
        return form.epilogue(form.decode(stored).float(), stored).squeeze(1).to(self.dtype)

    def _stored(self, which: str, coded: Tensor) -> Stored:
        """Bytes [G, P, bytes] as a form reads them, parts [G, 1, P, ...]."""
        form, d = self.forms["kv".index(which)], self.d if which == "k" else self.dv
        parts, at = {}, 0
        for name, (shape, kind, size) in _layout(form, d, self.dtype).items():
            piece = coded[..., at : at + size]
            if any(step % kind.itemsize for step in (*coded.stride()[:2], piece.storage_offset())):
                piece = piece.clone(memory_format=torch.contiguous_format)
            parts[name] = piece.view(kind).view(len(coded), 1, coded.shape[1], *shape)
            at += size
        slots = torch.arange(coded.shape[1], device=coded.device)
        return Stored(1, parts, {}, slots, lambda span: slots, lambda: slots, None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, length: Tensor, spec: Spec) -> Partial | None:
        """Attention of q [B, Hq, n, d] over bytes of keys and values [G, P, bytes] where they lie: of each head's slots
        ids [1, B * H, m] in all of them the first length [1, B * H]; None: there is no kernel."""
        batch, q_heads, n, d = q.shape
        stored = self._stored("k", k.flatten(0, 1)[None]), self._stored("v", v.flatten(0, 1)[None])
        rows = q.reshape(1, batch * q_heads, n, d)
        found = attend_in_place(self.forms, rows, stored, Reading(ids, length, spec.scale, spec.softcap))
        if found is None or found.lse is None:
            return None
        return Partial(found.out.view(batch, q_heads, n, -1), found.lse.view(batch, q_heads, n))

    def attend_tiles(self, q: Tensor, k: Tensor, v: Tensor, spec: Spec, visible: Visible, probabilities: bool) -> Partial:
        """Attention of q [G, g, n, d] over bytes of keys and values [G, P, bytes], each tile for itself."""
        stored = self._stored("k", k), self._stored("v", v)
        return attend(self.forms, q, stored, spec.scale, visible, spec.softcap, probabilities)

    def keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """A query [G, g, n, d] as it meets the keys of bytes [G, P, bytes], and those as vectors [G, 1, P, d], fp32."""
        stored = self._stored("k", k)
        return prepared(self.forms, q, stored), self.forms[0].decode(stored).float()


def _tokens(x: Tensor) -> Tokens:
    places = torch.arange(len(x), device=x.device)
    return Tokens(x[None, None], places.view(1, 1, -1), None, {}, places[:1])


@lru_cache
def _layout(form: Form, d: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
    """Shape, type and bytes of each part of a token."""
    parts = form.encode(_tokens(torch.zeros(1, d, dtype=dtype)))
    return {name: (tuple(parts[name].shape[3:]), parts[name].dtype, parts[name].nbytes) for name in form.spans}
