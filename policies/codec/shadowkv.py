"""ShadowKV: low-rank keys on the device, values in the host, chunks found by landmarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.kernels.attention import Partial
from kvlib.kernels.bounds import bounds
from kvlib.kernels.decode_lowrank import decode_lowrank
from kvlib.kernels.low_rank import row_space
from kvlib.kernels.quantise import folded
from kvlib.kernels.ran import note
from kvlib.kernels.rotary import frequencies
from kvlib.policies.base import Composition, Method, RecipeError, check_whole, register
from kvlib.policies.encoding import DENSE, PATCH, Codec, Form, Reading, Stored, Tokens
from kvlib.policies.selection import Block, Index, Selector, Units
from kvlib.policies.tier.host import Host

_NOWHERE = torch.iinfo(torch.int32).max


def cohesion(keys: Tensor, chunk: int) -> Tensor:
    """How well the mean of each chunk of keys [R, H, m, d] stands for it: the least cosine to one of its keys,
    [R, H, m / chunk]."""
    chunks = folded(keys.float(), 2, chunk)
    return torch.cosine_similarity(chunks, chunks.mean(3, keepdim=True), dim=-1).amin(-1)


def outlying(keys: Tensor, chunk: int, outliers: int) -> Tensor:
    """The chunks [R, H, O] of keys [R, H, m, d] that their means stand for worst, in order: `outliers`, but of few chunks
    at most an eighth."""
    found = cohesion(keys, chunk)
    worst = found.argsort(dim=-1, stable=True)[..., : min(outliers, found.shape[-1] // 8)]
    return worst.sort(-1).values


@dataclass(frozen=True)
class LowRankKeys(Form):
    """Coefficients in the rows that span the prompt's keys before their rotary embedding, all heads together.

    Later tokens are projected on the same rows.  Chunks whose mean stands for them badly are exact as well.
    """

    scope: ClassVar[str] = "group"
    needs_rotary: ClassVar[bool] = True

    rank: int
    chunk: int
    outliers: int

    @property
    def spans(self) -> Mapping[str, int]:
        """A row of coefficients per token; exact keys and their slots, counted from 1."""
        return {"u": 1, "exact": PATCH, "slot": PATCH}

    @property
    def grain(self) -> int:
        """A chunk."""
        return self.chunk

    @property
    def moving(self) -> frozenset[str]:
        """Keys stay on the device."""
        return frozenset()

    @property
    def least(self) -> int:
        """Twice the rank: rows fitted to fewer tokens would not span those to come."""
        return 2 * self.rank

    @property
    def fitted(self) -> bool:
        """By the rows that span the prompt's keys."""
        return True

    def fit(self, tokens: Tokens) -> dict[str, Tensor]:
        """The rows [R, H, r, d], orthonormal over all heads, in the model's type."""
        bare = self._bare(tokens)
        rows, heads, m, d = bare.shape
        flat = bare.transpose(1, 2).reshape(rows, m, heads * d)
        basis, _ = row_space(flat, min(self.rank, heads * d))
        return {"basis": basis.view(rows, -1, heads, d).transpose(1, 2).to(tokens.x.dtype).contiguous()}

    def _bare(self, tokens: Tokens) -> Tensor:
        """Keys [R, H, m, d] before their rotary embedding, fp32."""
        assert tokens.rotary is not None
        return tokens.rotary.turn_back(tokens.x, tokens.positions)

    def encode(self, tokens: Tokens) -> dict[str, Tensor]:
        """Coefficients [R, 1, m, r], and the keys [R, H, O * chunk, d] of outlying chunks with their slots."""
        note("encoding", "torch")
        x, basis = tokens.x, tokens.fixed["basis"].float()
        u = (self._bare(tokens) @ basis.mT).sum(1, keepdim=True)
        worst = outlying(x, self.chunk, self.outliers if tokens.fresh else 0)
        place = (worst.unsqueeze(-1) * self.chunk + torch.arange(self.chunk, device=x.device)).flatten(2)
        exact = x.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))
        slot = place + tokens.first.view(-1, 1, 1) + 1
        return {"u": u.to(x.dtype), "exact": exact, "slot": slot.int()}

    def decode(self, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
        """The keys [B, H, m, d] in `dtype`, turned to their positions."""
        assert stored.rotary is not None
        note("codes", "torch")
        basis = stored.fixed["basis"].float()
        x = stored.rotary.turn(stored.parts["u"].float() @ basis, stored.positions)
        exact = stored.parts["exact"]
        at = _exact_at(stored, stored.slots.expand(*x.shape[:3]))
        if at is None:
            return x.to(dtype)
        found = exact.gather(2, at.clamp(min=0).unsqueeze(-1).expand_as(x)).float()
        return torch.where((at >= 0).unsqueeze(-1), found, x).to(dtype)

    def attend(self, values: Form, q: Tensor, stored: tuple[Stored, Stored], reading: Reading) -> Partial | None:
        """In one kernel that rebuilds keys as it meets them: of chosen tokens, on a GPU of all as well."""
        (k, v), ids = stored, reading.ids
        if values is not DENSE or k.rotary is None or not (q.is_cuda if ids is None else ids.shape[1] <= k.heads):
            return None
        if k.slots.dim() > 1:  # picked for each head: the kernel has one row of coefficients for all
            return None
        slots = (k.slots if ids is None else ids).expand(len(q), k.heads, -1)
        found = decode_lowrank(
            q.to(v.parts["x"].dtype),
            k.parts["u"],
            k.fixed["basis"],
            v.parts["x"],
            frequencies(k.rotary.inv_freq, q.device),
            reading.scale,
            k.rotary.scaling,
            reading.softcap or 0.0,
            k.rotary.interleaved,
            length=None if reading.length is None else reading.length.int(),
            positions=k.positions.expand(len(q), -1, -1),
            ids=ids,
            where=reading.where,
            exact=k.parts["exact"],
            at=_exact_at(k, slots),
        )
        return Partial(*found)

    def bytes_per_token(self, d: int, n: int = 0, itemsize: int = 2, merged: int = 0) -> float:
        """A row of coefficients, for all heads."""
        return self.rank * itemsize


def _exact_at(stored: Stored, slots: Tensor) -> Tensor | None:
    """Where the exact keys of slots [B, H, m] are among those there are, int64 [B, H, m], -1 for those that are rebuilt;
    None: there are none."""
    slot = stored.parts["slot"]
    if not slot.shape[2]:
        return None
    known = torch.where(slot > 0, slot - 1, _NOWHERE).expand(*slots.shape[:2], -1).contiguous()
    wanted = slots.int().contiguous()
    at = torch.searchsorted(known, wanted).clamp_(max=known.shape[-1] - 1)
    return torch.where(known.gather(-1, at) == wanted, at, -1)


@register
@dataclass(frozen=True)
class LowRank(Codec):
    """Keep keys as coefficients of few rows that span them before their rotary embedding; values stay as they are.

    The codec of ShadowKV, arXiv 2410.21465.  The rows come from the prompt; later tokens are projected on them.
    rank:     of all KV heads together.
    chunk:    tokens whose keys are exact together; outliers: chunks of a prompt that are, at most an eighth of its chunks.
    """

    name: ClassVar[str] = "low_rank"
    paper: ClassVar[str] = "2410.21465"

    rank: int = 160
    chunk: int = 8
    outliers: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.name, "rank", self.rank, 1)
        check_whole(self.name, "chunk", self.chunk, 1)
        check_whole(self.name, "outliers", self.outliers)

    def keys(self) -> Form:
        """Low rank."""
        return LowRankKeys(self.rank, self.chunk, self.outliers)

    def values(self) -> Form:
        """As they are."""
        return DENSE

    def within(self, heads: int, d: int) -> Codec:
        """No more rank than the group's keys can have."""
        return replace(self, rank=min(self.rank, heads * d))

    def fit(self, layers: int, heads: int, d: int) -> None:
        """Also raise where the rank exceeds what the keys have."""
        if self.rank > heads * d:
            raise RecipeError(
                self.name, "rank", self.rank, f"keys of {heads} heads of size {d} have rank {heads * d} at most"
            )


@register
@dataclass(frozen=True)
class Landmarks(Selector):
    """Rank chunks by the mean of their keys; chunks for which it stands badly are always read.

    The selection of ShadowKV, arXiv 2410.21465: a chunk counts as much as to the query head that wants it most.
    chunk:    tokens of a chunk.
    outliers: chunks of a prompt that are always read, at most an eighth of its chunks and a quarter of the budget.
    """

    name: ClassVar[str] = "landmarks"
    paper: ClassVar[str] = "2410.21465"
    loudest: ClassVar[bool] = True

    budget: int | float = 2048
    chunk: int = 8
    outliers: int = 48

    def __post_init__(self) -> None:
        check_whole(self.name, "chunk", self.chunk, 1)
        check_whole(self.name, "outliers", self.outliers)
        super().__post_init__()
        if self.scope != "kv_head":
            raise RecipeError(
                self.name, "scope", self.scope, "each KV head has chunks of its own that stand out: leave it out"
            )

    @property
    def run(self) -> int:
        """A chunk."""
        return self.chunk

    def build(self, block: Block) -> Units:
        """Mean keys [R, H, U, d], and which chunks stand out."""
        keys = block.keys
        mean = folded(keys.float(), 2, self.chunk).mean(3)
        worst = outlying(keys, self.chunk, self._most(mean.shape[2]) if block.fresh else 0)
        always = torch.zeros(mean.shape[:3], dtype=torch.bool, device=keys.device).scatter_(2, worst, True)
        return Units({"landmark": mean.to(keys.dtype), "always": always})

    def _most(self, chunks: int) -> int:
        """Chunks of a prompt that are always read: at most a quarter of the budget."""
        share = self.budget * chunks if isinstance(self.budget, float) else self.budget / self.chunk
        return min(self.outliers, int(share / 4))

    def logits(self, q: Tensor, index: Index) -> Tensor:
        """Products with the landmarks."""
        return bounds(q, index.summary["landmark"])

    def always(self, index: Index) -> Tensor | None:
        """Chunks that stand out."""
        return index.summary["always"]


@register
@dataclass(frozen=True)
class ShadowKV(Composition):
    """Keep keys as low-rank factors on the device and values in host memory, and read the chunks that landmarks point to.

    ShadowKV, arXiv 2410.21465: `landmarks + low_rank @ host`.  Unlike the reference, generated tokens and later turns are
    chunked, projected and moved like the prompt.  Write `@ device` to keep values on the device.
    budget:   tokens read per query, outliers included; rank, chunk, outliers as for `low_rank` and `landmarks`.
    """

    name: ClassVar[str] = "shadowkv"
    paper: ClassVar[str] = "2410.21465"
    lossless_recall: ClassVar[bool] = True

    budget: int | float = 2048
    rank: int = 160
    chunk: int = 8
    outliers: int = 48

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> tuple[Method, ...]:
        """Selector, codec and tier."""
        select = Landmarks(budget=self.budget, chunk=self.chunk, outliers=self.outliers)
        return select, LowRank(rank=self.rank, chunk=self.chunk, outliers=self.outliers), Host()
