"""GEAR: a few bits for the bulk, a low-rank term for errors that tokens share, exact values for what stands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.kernels.attention import Partial
from kvlib.kernels.decode_gear import MOST, decode_gear
from kvlib.kernels.low_rank import low_rank
from kvlib.kernels.quantise import folded
from kvlib.kernels.ran import Noting, note
from kvlib.policies.base import RecipeError, check_whole, register
from kvlib.policies.codec.kivi import check_bits
from kvlib.policies.codec.uniform import Uniform
from kvlib.policies.encoding import MERGED, SEGMENT, Codec, Form, Reading, Stored, Tokens, grouped


@dataclass(frozen=True)
class Corrected(Form):
    """D + L + S: the codes of `base`, rank-`rank` factors of what they miss, and the share `s` of entries that stand out.

    A vector is a channel over `page` tokens, or without pages a token; its largest and smallest entries are set to its mean
    before it is coded, and are corrected to an ulp of fp16 afterwards.
    """

    base: Uniform
    rank: int
    s: float
    page: int = 0

    @property
    def spans(self) -> Mapping[str, int]:
        """The base's, the factors a per token and b per segment, outliers per page or token."""
        outliers = {"error": self.page or 1, "place": self.page or 1} if self.s else {}
        return {**self.base.spans, "a": 1, "b": MERGED, **outliers}

    @property
    def moving(self) -> frozenset[str]:
        """All of a single token but what merging rewrites."""
        return super().moving - {"a", "error"}

    def check(self, name: str, d: int) -> None:
        """As the base; places fit a byte."""
        self.base.check(name, d)
        if d > 256 and self.s:
            raise RecipeError(name, "s", self.s, f"places of outliers are bytes, too few for head size {d}: use gear_l")
        if self.rank > d:
            raise RecipeError(name, "rank", self.rank, f"give a rank up to the head size {d}")

    def ends(self, d: int) -> int:
        """Largest entries of a vector that are exact, and as many smallest."""
        return max(1, round(self.s * (self.page or d) / 2)) if self.s else 0

    def encode(self, tokens: Tokens) -> dict[str, Tensor]:
        """Codes and ranges, a [R, H, m, r], b [R, H, 1, d, r], the outliers' errors fp16 and places uint8."""
        x = tokens.x.float()
        if not self.s:
            parts = self.base.quantise(x)
            return parts | self._factors(x - self._coded(parts, x))
        vectors, ends = self._vectors(x), self.ends(x.shape[3])
        low = vectors.topk(ends, 3, largest=False).indices
        high = vectors.scatter(3, low, float("-inf")).topk(ends, 3).indices  # an entry is one or the other
        place = torch.cat([low, high], 3)
        mean = vectors.mean(3, keepdim=True)
        parts = self.base.quantise(self._tokens(vectors.scatter(3, place, mean.expand(place.shape))))
        coded = self._coded(parts, x)
        residual = self._vectors(x - coded).scatter(3, place, 0.0)
        parts |= self._factors(self._tokens(residual))
        near = coded + parts["a"].float() @ parts["b"].squeeze(2).float().mT
        error = (vectors - self._vectors(near)).gather(3, place)
        return parts | {name: part.squeeze(4) for name, part in (("error", _half(error)), ("place", place.to(torch.uint8)))}

    def _coded(self, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What codes make of x [R, H, m, d], fp32; part of encoding, and so no reading to be noted."""
        with Noting(set()):
            return self.base.decode(_as_stored(parts, x))

    def _vectors(self, x: Tensor) -> Tensor:
        """x [R, H, m, d] with its vectors along axis 3: [R, H, m / page, page, d], or [R, H, m, d, 1]."""
        return folded(x, 2, self.page) if self.page else x.unsqueeze(4)

    def _tokens(self, vectors: Tensor) -> Tensor:
        """Back to [R, H, m, d]."""
        return vectors.flatten(2, 3) if self.page else vectors.squeeze(4)

    def _factors(self, residual: Tensor) -> dict[str, Tensor]:
        """The low-rank term of a segment's residual [R, H, m, d]."""
        note("encoding", "torch")
        a, b = low_rank(residual, self.rank)
        return {"a": a.half(), "b": b.half().unsqueeze(2)}

    def decode(self, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tokens [B, H, m, d] in `dtype`."""
        note("codes", "torch")
        return (self.coarse(stored) + self._apart(stored) @ self._rows(stored)).to(dtype)

    def coarse(self, stored: Stored) -> Tensor:
        """Codes and outliers, without the low-rank term."""
        x = self.base.decode(stored)
        if not self.s:
            return x
        error, place = stored.parts["error"].float(), stored.parts["place"]
        if not self.page:
            return x.scatter_add(3, place.long(), error)
        if place.shape[2] * self.page == x.shape[2]:
            return folded(x, 2, self.page).scatter_add(3, place.long(), error).flatten(2, 3)
        within = (stored.slots % self.page).unsqueeze(-1).unsqueeze(-1)  # tokens picked one by one
        return x + (error * (place == within)).sum(3)

    def _rows(self, stored: Stored) -> Tensor:
        """The factors b of all segments, [B, H, S * r, d]."""
        return stored.parts["b"].float().mT.flatten(2, 3)

    def _apart(self, stored: Stored) -> Tensor:
        """The factors a [B, H, m, S * r], each token's in the columns of its segment."""
        a, segments = stored.parts["a"].float(), stored.parts["b"].shape[2]
        if segments == 1:
            return a
        own = stored.segment(MERGED).unsqueeze(-1) == torch.arange(segments, device=a.device)
        return (own.unsqueeze(-1) * a.unsqueeze(-2)).flatten(-2)

    def decodes(self, stored: Stored) -> bool:
        """Factors are met by what is small."""
        return False

    def scores(self, q: Tensor, stored: Stored) -> Tensor:
        """q.D + (q b) a^T + q.S."""
        note("codes", "torch")
        qb = grouped(q, self._rows(stored).mT)
        return grouped(q, self.coarse(stored).mT) + grouped(qb, self._apart(stored).mT)

    def weighted_sum(self, p: Tensor, stored: Stored) -> Tensor:
        """p D + (p a) b^T + p S."""
        note("codes", "torch")
        pa = grouped(p, self._apart(stored))
        return grouped(p, self.coarse(stored)) + grouped(pa, self._rows(stored))

    def attend(self, values: Form, q: Tensor, stored: tuple[Stored, Stored], reading: Reading) -> Partial | None:
        """On a GPU all of a body in one pass, or a piece of it."""
        if not q.is_cuda or reading.ids is not None or not isinstance(values, Corrected):
            return None
        if stored[0].slots.dim() > 1:  # picked one by one: there are no segments to walk
            return None
        return self.in_one_pass(values, q, stored, reading)

    def in_one_pass(self, values: Corrected, q: Tensor, stored: tuple[Stored, Stored], reading: Reading) -> Partial | None:
        """Attention over neighbouring tokens, codes, factors and outliers read once; None where the kernel does not take
        them."""
        k, v = (x.parts for x in stored)
        d, ends = q.shape[3], stored[0].ends
        by_segment = not self.base.group and k["range"].shape[2] > 1  # merging leaves more ranges than factors
        alike = self.base.bits == values.base.bits and self.rank == values.rank
        fits = alike and d in (64, 128) and v["codes"].shape[3] * 8 == d * values.base.bits and self.rank in (2, 4, 8)
        whole = self.base.group % 32 == 0 and self.page % 32 == 0  # tiles, which have one range and lie in one page
        few = max(self.ends(d), values.ends(d)) * 2 <= MOST
        if not (fits and whole and few and self.base.per_channel and not values.base.per_channel):
            return None
        found = decode_gear(
            q,
            k["codes"],
            k["range"],
            k["a"],
            k["b"],
            v["codes"],
            v["range"],
            v["a"],
            v["b"],
            reading.scale,
            span=self.base.group,
            page=self.page,
            k_error=k.get("error"),
            k_place=k.get("place"),
            v_error=v.get("error"),
            v_place=v.get("place"),
            softcap=reading.softcap or 0.0,
            length=None if reading.length is None else reading.length.int(),
            ends=ends[MERGED] if k["b"].shape[2] > 1 else None,
            range_ends=ends[SEGMENT] if by_segment else None,
        )
        return Partial(*found)

    def merge(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The low-rank terms of several segments as one of the same rank; outliers stay exact."""
        a, b = parts["a"].float(), parts["b"].float()
        before = (folded(a, 2, a.shape[2] // b.shape[2]) @ b.mT).flatten(2, 3)
        found = self._factors(before)
        if not self.s:
            return found
        change = before - found["a"].float() @ found["b"].squeeze(2).float().mT
        place = parts["place"].to(change.device).long()  # a token's own lie in the host tier, where there is one
        place = place if self.page else place.unsqueeze(4)
        shift = self._vectors(change).gather(3, place)
        error = parts["error"].float() + (shift if self.page else shift.squeeze(4))
        return found | {"error": _half(error)}

    def bytes_per_token(self, d: int, n: int = 0, itemsize: int = 2, merged: int = 0) -> float:
        """Codes and ranges, 2 r (1 + d / n) in merged segments of n, and 3 bytes per outlier."""
        factors = 2 * self.rank * (1 + (d / merged if merged else 0.0))
        outliers = 2 * self.ends(d) * 3 * (d / self.page if self.page else 1)
        return self.base.bytes_per_token(d, n) + factors + outliers


def _half(x: Tensor) -> Tensor:
    """x in fp16, as near as it can be."""
    return x.clamp(-65504.0, 65504.0).half()


def _as_stored(parts: Mapping[str, Tensor], x: Tensor) -> Stored:
    """One segment just encoded, as it will be read."""
    rows, heads, m, _ = x.shape
    slots = torch.arange(m, device=x.device)
    return Stored(heads, parts, {}, slots, lambda span: torch.zeros_like(slots).expand(rows, 1, -1), lambda: slots, None)


@register
@dataclass(frozen=True)
class Gear(Codec):
    """Correct what few bits lose: a low-rank term for errors that tokens share, exact values for entries that stand out.

    GEAR, arXiv 2403.05527 v4.  Outliers are exact, which the reference's are not, and one rank serves prompt and generated
    tokens: of the latter, segments are merged eight at a time, so that their factors soon weigh nothing
    (the ranges of KCVT stay those of each segment).
    bits:   of the codes.
    group:  as in kivi, the paper's 64 at 2 bits; 0: the paper's KCVT, one range per channel of a segment and one per token.
        "auto": 0 from 4 bits on, else 64.
    rank:   of the low-rank term, per head, the paper's r_p.
    s:      share of entries that are kept exact, at least a largest and a smallest one per vector; 0: none (GEAR-L).
    recent: newest tokens that are dense.
    """

    name: ClassVar[str] = "gear"
    paper: ClassVar[str] = "2403.05527"

    bits: int = 4
    group: int | str = "auto"
    rank: int = 4
    s: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.name, "bits", self.bits)
        check_whole(self.name, "rank", self.rank, 1)
        if self.group != "auto":
            check_whole(self.name, "group", self.group)
            if self.group == 1 or self.tokens > 256:
                raise RecipeError(self.name, "group", self.group, "give 2 to 256 tokens, 0 for a whole segment, or auto")
        if isinstance(self.s, bool) or not isinstance(self.s, int | float) or not 0 <= self.s <= 0.25:
            raise RecipeError(self.name, "s", self.s, "give a share of entries from 0 to 0.25")
        if self.s and self.page > 256:
            remedy = "outliers are sought among 256 tokens at most: give a larger share, smaller groups, or 0 (gear_l)"
            raise RecipeError(self.name, "s", self.s, remedy)

    @property
    def tokens(self) -> int:
        """Tokens of a channel that share a range; 0: a whole segment."""
        if isinstance(self.group, int):
            return self.group
        return 0 if self.bits >= 4 else 64

    @property
    def page(self) -> int:
        """Tokens of a key channel among which outliers are sought: whole groups, of which s is about two tokens."""
        step = self.tokens or 64
        return max(1, round(2 / self.s / step)) * step if self.s else 0

    def keys(self) -> Form:
        """Channel by channel."""
        return Corrected(Uniform(self.bits, self.tokens, per_channel=True), self.rank, self.s, self.page)

    def values(self) -> Form:
        """Token by token."""
        return Corrected(Uniform(self.bits, self.tokens), self.rank, self.s)


@register
@dataclass(frozen=True)
class GearL(Gear):
    """Correct what few bits lose by a low-rank term for errors that tokens share.

    GEAR-L, arXiv 2403.05527 v4: gear without its exact entries.
    """

    name: ClassVar[str] = "gear_l"

    s: float = 0.0
