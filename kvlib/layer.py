"""One layer's cache: its head groups, and what one chunk of queries, keys and values does to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvlib import census
from kvlib.group import HeadGroup, TokenIds
from kvlib.kernels.ran import Notes, Noting
from kvlib.offload.resident import Traffic
from kvlib.offload.transfer import sent
from kvlib.segment import Spec


@dataclass(frozen=True)
class NewTokens:
    """Which columns of a chunk [B, n] are tokens: `count` [B] of them per row, the rest padding.

    order [B, n] puts each row's tokens last, in order, and inverse undoes it; both None where they stand last already.
    older [B] is how many earlier columns the mask calls tokens and trailing [B] how many of the last of them it calls
    padding; None where that was not read.
    """

    count: np.ndarray
    order: Tensor | None = None
    inverse: Tensor | None = None
    older: np.ndarray | None = None
    trailing: np.ndarray | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, n: int) -> NewTokens:
        """Read a padding mask [B, seen + n], nonzero for tokens.  Costs one transfer to the host, of the last column only
        for n = 1."""
        if n == 1:
            return cls(mask[:, -1:].to(torch.bool).cpu().numpy().sum(1))
        whole = mask.to(torch.bool).cpu().numpy()
        host, past = whole[:, whole.shape[1] - n :], whole[:, : whole.shape[1] - n]
        count, older = host.sum(1), past.sum(1)
        trailing = np.where(past.any(1), past[:, ::-1].argmax(1), past.shape[1]) if past.shape[1] else older
        if (host == (np.arange(n) >= n - count[:, None])).all():
            return cls(count, older=older, trailing=trailing)
        order = sent(host.argsort(1, kind="stable"), mask.device)
        return cls(count, order, order.argsort(1), older, trailing)


class Layer:
    """Keys and values of one attention layer, split into head groups.

    heads[i] are the KV heads of groups[i], or None for all.  Storage is created on the device of the first keys.
    """

    def __init__(self, groups: Sequence[HeadGroup], heads: Sequence[np.ndarray | None]):
        self.groups = list(groups)
        self.heads = list(heads)
        self._index: list[tuple[Tensor, Tensor]] | None = None  # per group (KV heads, query heads) on the device
        self.inverse: Tensor | None = None
        self.shape: tuple[int, int, int, int] | None = None  # batch, KV heads, d, dv
        self._permuted = False  # whether a chunk's columns were put in another order than the model's mask has them
        self.ran: Notes = set()  # what was computed by what

    def clear(self) -> None:
        """Forget every token, and the batch they came from."""
        for group in self.groups:
            group.clear()
        self.shape, self._permuted = None, False
        self.ran.clear()

    @torch.no_grad()
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new: NewTokens | None,
        spec: Spec,
        recording: bool = False,
        drafts: int | None = None,
    ) -> Tensor:
        """Take in a chunk and attend it: q [B, Hq, n, d], k [B, H, n, d], v [B, H, n, dv] post-rotary; returns
        [B, Hq, n, dv] in q's dtype.  `new` is None where every column is a token;
        see `HeadGroup.forward` for recording and drafts.

        Raises ValueError, with the cache as it was, for a chunk that does not fit what is held.
        """
        self.check(k, v)
        self._retract_padding(new)
        count = None if new is None or (new.count == k.shape[2]).all() else new.count
        if new is not None and new.order is not None:
            q, k, v = (_permute(x, new.order) for x in (q, k, v))
            self._permuted = True
        self.shape = (k.shape[0], k.shape[1], k.shape[3], v.shape[3])
        empty = 0 if count is None or not count.any() else k.shape[2] - int(count.max())
        if count is not None and empty:  # columns that are padding in every row: there may be fewer keys than queries
            q, k, v = q[:, :, empty:], k[:, :, empty:], v[:, :, empty:]
            count = None if int(count.min()) == k.shape[2] else count
        with Noting(self.ran):
            if len(self.groups) == 1:
                out = self.groups[0].forward(q, k, v, count, spec, recording, drafts)
            else:
                out = self._forward_groups(q, k, v, count, spec, recording, drafts)
        if empty:
            out = torch.nn.functional.pad(out, (0, 0, empty, 0))
        if new is not None and new.inverse is not None:
            out = _permute(out, new.inverse)
        return out.to(q.dtype)

    def check(self, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless a chunk k [B, H, n, d], v fits what is held."""
        if self.shape is None:
            return
        tail = self.groups[0].tail
        assert tail is not None
        got = (k.shape[0], k.shape[1], k.shape[3], v.shape[3])
        if got != self.shape:
            raise ValueError(
                f"the cache holds (batch, KV heads, key size, value size) = {self.shape}, the new tokens have {got}: "
                "call cache.reset() before another batch, or make a cache of its own for it"
            )
        if k.dtype != tail.k.dtype or k.device != tail.k.device:
            raise ValueError(
                f"the cache holds {tail.k.dtype} on {tail.k.device}, the new tokens are {k.dtype} on {k.device}: "
                "call cache.reset() after moving or casting the model"
            )

    def _retract_padding(self, new: NewTokens | None) -> None:
        """Drop tokens that the mask now calls padding: the newest of rows that ended before others did.

        Raises ValueError where they are not the newest, or have left their mark on what was evicted.
        """
        if new is None or new.older is None or new.trailing is None or self.shape is None:
            return
        hidden = np.maximum(self.groups[0].tokens - new.older, 0)
        if not hidden.any():
            return
        if (hidden > new.trailing).any() or not all(group.can_retract(hidden) for group in self.groups):
            row = int(hidden.argmax())
            raise ValueError(
                f"attention_mask hides {hidden[row]} tokens of row {row} that the cache has taken in as real and cannot "
                "drop without a trace: mask padding when it is first given, or use one cache per conversation"
            )
        for group in self.groups:
            group.retract(hidden)

    def _forward_groups(
        self, q: Tensor, k: Tensor, v: Tensor, count: np.ndarray | None, spec: Spec, recording: bool, drafts: int | None
    ) -> Tensor:
        outs = []
        for group, (kv_heads, q_heads) in zip(self.groups, self.places(q.shape[1] // k.shape[1], q.device), strict=True):
            chunk = q[:, q_heads], k[:, kv_heads], v[:, kv_heads]
            outs.append(group.forward(*chunk, count, spec.of_heads(q_heads), recording, drafts))
        assert self.inverse is not None
        return torch.cat(outs, 1).index_select(1, self.inverse)

    def places(self, per_kv: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Per group its (KV heads, query heads), `per_kv` query heads to a KV head, kept on the device."""
        if self._index is None or self._index[0][0].device != device:
            self._index = []
            for heads in self.heads:
                assert heads is not None
                queries = (heads[:, None] * per_kv + np.arange(per_kv)).ravel()
                self._index.append((sent(heads, device), sent(queries, device)))
            self.inverse = torch.cat([queries for _, queries in self._index]).argsort()
        return self._index

    def finish_prefill(self) -> None:
        """The prompt is complete: one-shot methods evict, fractional budgets are frozen."""
        with Noting(self.ran):
            for group in self.groups:
                group.finish_prefill()

    def check_crop(self, n: int) -> None:
        """Raise ValueError where `crop(n)` would."""
        for group in self.groups:
            group.check_crop(n)

    def crop(self, n: int) -> None:
        """Take back the newest n tokens of every row."""
        for group in self.groups:
            group.crop(n)

    def reorder(self, rows: Tensor) -> None:
        """Select batch rows [B']."""
        if self.shape is None:
            return
        for group in self.groups:
            group.reorder(rows)
        self.shape = (len(rows), *self.shape[1:])

    def dense(self) -> tuple[Tensor, Tensor] | None:
        """All keys and values [B, H, seen, d] where nothing was ever moved or dropped, else None."""
        if len(self.groups) != 1 or self._permuted:
            return None
        group = self.groups[0]
        tail = group.tail
        if tail is None or group.sink is not None or group.body is not None or tail.repacked or not group.plain:
            return None
        return tail.k[:, :, : tail.end], tail.v[:, :, : tail.end]

    def copy(self, token_ids: TokenIds | None) -> Layer:
        """An independent layer in the same state, reading ids from `token_ids`."""
        twin = Layer([group.copy(token_ids) for group in self.groups], self.heads)
        twin.shape, twin._index, twin.inverse = self.shape, self._index, self.inverse
        twin._permuted, twin.ran = self._permuted, set(self.ran)
        return twin

    def adopt(self, other: Layer, per_kv: int) -> None:
        """Go on from a prompt that a layer of one group has read densely, `per_kv` query heads to a KV head; see
        `HeadGroup.adopt`."""
        if other.shape is None:
            return
        (read,) = other.groups
        self.shape, self._permuted = other.shape, other._permuted
        if len(self.groups) == 1:
            self.groups[0].adopt(read, None, None)
            return
        for group, (kv_heads, q_heads) in zip(self.groups, self.places(per_kv, other.device), strict=True):
            group.adopt(read, kv_heads, q_heads)

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        tail = self.groups[0].tail
        assert tail is not None
        return tail.k.device

    def kept(self) -> np.ndarray:
        """Tokens held, int64 [B, H]."""
        return self._counts(census.kept)

    def attended(self) -> np.ndarray:
        """Tokens a query after the prompt attends, int64 [B, H]."""
        return self._counts(census.attended)

    def _counts(self, count: Callable[[HeadGroup], np.ndarray]) -> np.ndarray:
        if self.shape is None:
            return np.zeros((0, 0), dtype=np.int64)
        counts = np.zeros(self.shape[:2], dtype=np.int64)
        for group, heads in zip(self.groups, self.heads, strict=True):
            counts[:, slice(None) if heads is None else heads] = count(group)
        return counts

    def positions(self) -> list[list[Tensor]]:
        """Positions of the tokens held, ascending, per batch row and KV head."""
        if self.shape is None:
            return []
        rows: list[list[Tensor]] = [[torch.empty(0)] * self.shape[1] for _ in range(self.shape[0])]
        for group, heads in zip(self.groups, self.heads, strict=True):
            held = census.positions(group)
            for r, row in enumerate(held):
                for i, found in enumerate(row):
                    rows[r][i if heads is None else heads[i]] = found
        return rows

    def traffic(self) -> Traffic:
        """What reading cost between host and device so far."""
        found = [census.traffic(group) for group in self.groups]
        return Traffic(*(sum(column) for column in zip(*found, strict=True)))

    def nbytes(self, used: bool, seen: set[int]) -> dict[tuple[str, str], int]:
        """Bytes by (tier, part); see `Cache.nbytes`."""
        total: dict[tuple[str, str], int] = {}
        for group in self.groups:
            for place, size in census.nbytes(group, used, seen).items():
                total[place] = total.get(place, 0) + size
        index = [x for pair in self._index or [] for x in pair]
        if self.inverse is not None:
            index.append(self.inverse)
        place = ("device", "statistics")
        total[place] = total.get(place, 0) + sum(x.nbytes for x in index)
        return total


def _permute(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x [B, H, n, d] in the order [B, n]."""
    return x.gather(2, order[:, None, :, None].expand_as(x))
