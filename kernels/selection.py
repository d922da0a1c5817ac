"""From scores of units to the tokens a query reads: votes of query heads, exact top-k, whole units and the one that is cut.

A unit is a set of tokens that stand side by side in their store: a page, a cluster, a sentence, one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvlib.kernels import listing
from kvlib.kernels import rank as ranking
from kvlib.kernels.bounds import products
from kvlib.kernels.launch import Example
from kvlib.kernels.ops import register
from kvlib.kernels.ran import note
from kvlib.kernels.take import take


# ------------------------------------------------------------------------------------------------------------- ranking
def sorted_top(score: Tensor, k: int) -> Tensor:
    """Arguments and result as of `top`.

    A float's bits order like an integer's once the negative ones are flipped; the index below them makes every key unique,
    so that any top-k routine on any device gives the same answer.
    """
    units = score.shape[-1]
    bits = (
        torch.nan_to_num(score.float(), nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        .add(0.0)
        .view(torch.int32)
    )
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    place = torch.arange(units - 1, -1, -1, device=score.device)
    return units - 1 - (((ordered.long() << 32) | place).topk(k, dim=-1).values & 0xFFFFFFFF)


def launched_top(score: Tensor, k: int) -> Tensor:
    """The same by the kernels of `rank`, each row a query head by itself."""
    rows = score.reshape(-1, 1, score.shape[-1]).contiguous()  # their number must not be a constant of the kernel
    if not k or not rows.numel() or not ranking.fits(rows.shape[-1], k):
        return sorted_top(score, k)
    return ranking.ranked(rows, k, 0).view(*score.shape[:-1], k)


def _fake_top(score: Tensor, k: int) -> Tensor:
    return score.new_empty((*score.shape[:-1], k), dtype=torch.int64)


top: Callable[[Tensor, int], Tensor] = register(
    "top(Tensor score, SymInt k) -> Tensor", cpu=sorted_top, cuda=launched_top, fake=_fake_top
)
"""Indices [..., k] of the k largest of score [..., U] fp32, best first; ties go to the lower index, NaN counts as -inf."""


def vote(logits: Tensor, heads: int, rest: Tensor | None = None, loudest: bool = False) -> Tensor:
    """Sum, or with `loudest` maximum, over the query heads of each of `heads` groups of their softmax over the units,
    [B, heads, U].

    logits [B, Hq, U], scaled; -inf where a unit is absent.  rest [B, Hq] is the log-sum-exp of what is read in any case: it
    takes its share of a head's softmax, so that a head which looks elsewhere has little to say.
    """
    lse = logits.logsumexp(-1, keepdim=True)
    if rest is not None:
        lse = torch.logaddexp(lse, rest.unsqueeze(-1))
    lse = lse.masked_fill_(lse == float("-inf"), 0.0)
    p = (logits - lse).exp_()
    grouped = p.view(len(p), heads, -1, p.shape[-1])
    return grouped.amax(2) if loudest else grouped.sum(2)


def voted_rank(
    logits: Tensor,
    k: int,
    heads: int,
    scale: float = 1.0,
    softcap: float = 0.0,
    loudest: bool = False,
    rest: Tensor | None = None,
    count: Tensor | None = None,
    size: Tensor | None = None,
    always: Tensor | None = None,
) -> Tensor:
    """Arguments and result as of `rank`, one torch operation after the other."""
    note("selection", "torch")
    s = _scaled(logits, scale, softcap)
    s = _hide_absent(s, count, size)
    if not heads:
        return sorted_top(s, k)
    votes = vote(s, heads, rest, loudest)  # an absent unit has none, and one without reads nothing
    if always is not None:
        first = _hide_absent(always.float().masked_fill(~always, float("-inf")), count, size) > 0
        votes = votes.masked_fill(first, float("inf"))
    return sorted_top(votes, k)


def _scaled(s: Tensor, scale: float, softcap: float) -> Tensor:
    """Scores as the model's attention has them."""
    s = s if scale == 1.0 else s * scale
    return s.div(softcap).tanh_().mul_(softcap) if softcap else s


def _hide_absent(s: Tensor, count: Tensor | None, size: Tensor | None) -> Tensor:
    """s [B, ., U], but -inf where a row has no such unit or the unit is empty."""
    if count is not None:
        s = s.masked_fill(torch.arange(s.shape[-1], device=s.device) >= count.view(-1, 1, 1), float("-inf"))
    if size is not None:
        s = s.masked_fill((size == 0).repeat_interleave(s.shape[1] // size.shape[1], 1), float("-inf"))
    return s


def launched_rank(
    logits: Tensor,
    k: int,
    heads: int,
    scale: float = 1.0,
    softcap: float = 0.0,
    loudest: bool = False,
    rest: Tensor | None = None,
    count: Tensor | None = None,
    size: Tensor | None = None,
    always: Tensor | None = None,
) -> Tensor:
    """The same by the kernels of `kvlib.kernels.rank`; where they cannot sort so many, they only vote."""
    few = ranking.fits(logits.shape[-1], k)
    note("selection", "Triton" if few else "Triton and a sort by torch")
    found = ranking.ranked(logits, k, heads, scale, softcap, loudest, rest, count, size, always, select=few)
    return found if few else sorted_top(found, k)


def _fake_rank(logits: Tensor, k: int, heads: int, *arguments: object, **options: object) -> Tensor:
    return logits.new_empty((len(logits), heads or logits.shape[1], k), dtype=torch.int64)


rank: Callable[..., Tensor] = register(
    "rank(Tensor logits, SymInt k, int heads, float scale=1.0, float softcap=0.0, bool loudest=False, Tensor? rest=None, "
    "Tensor? count=None, Tensor? size=None, Tensor? always=None) -> Tensor",
    cpu=voted_rank,
    cuda=launched_rank,
    fake=_fake_rank,
)
"""The k best units of each list, int64 [B, heads, k], best first, ties by lower index: by the votes (`vote`) of the query
heads that share the list, or with heads=0 for each query head alone, [B, Hq, k], by its logits.

logits [B, Hq, U] fp32 become softcap * tanh(scale * logits / softcap); softcap 0: scale * logits.
rest:    [B, Hq] fp32, as of `vote`.  loudest: as of `vote`.
count:   int [B], units of each row; None: U.  size: int [B, H, U], 0 where a unit is empty; None: none is.
always:  bool [B, heads, U], units that come first whatever their votes.  With heads=0 nobody votes, so that these two and
         `rest` change nothing.
"""


# ------------------------------------------------------------------------------------------------------------- listing
class Listing(NamedTuple):
    """Slots [B, H, W] of units, best first: the first `before` belong to units that fit whole, those up to `length` to the
    one that must be cut to reach the room; both [B, H, 1] or one number for all."""

    ids: Tensor
    before: Tensor | int
    length: Tensor | int

    def valid(self) -> Tensor | None:
        """Mask [B, H, W] of the slots that mean something; None: all."""
        if isinstance(self.length, int):
            return None
        return torch.arange(self.ids.shape[-1], device=self.ids.device) < self.length


def list_runs(order: Tensor, run: int, room: Tensor | int, most: int) -> Listing:
    """The tokens of units of `run` tokens each, order [B, H, K] best first, to fill `room` ([B, 1, 1] or a number, at most
    `most`)."""
    units = order[..., : -(-most // run)]
    if run == 1:
        return Listing(units, room, room)
    ids = (units.unsqueeze(-1) * run + torch.arange(run, device=order.device)).flatten(-2)
    return Listing(ids, room // run * run, -(-room // run) * run)


def searched_units(
    order: Tensor, start: Tensor, size: Tensor, room: Tensor | None, space: int, most: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `list_units` gives, as three tensors; the room is in `space` where it is a number."""
    limit = space if room is None else room
    first, sizes = start.gather(-1, order).long(), size.gather(-1, order).long()
    ends = sizes.cumsum(-1)
    fits = ends <= limit
    before = (sizes * fits).sum(-1, keepdim=True)
    whole = fits.sum(-1, keepdim=True)
    next_size = sizes.gather(-1, whole.clamp(max=sizes.shape[-1] - 1))
    cut = torch.where((before < limit) & (whole < sizes.shape[-1]), next_size, 0)
    place = torch.arange(most + longest - 1, device=order.device).expand(*order.shape[:2], -1).contiguous()
    unit = torch.searchsorted(ends, place, right=True).clamp_(max=sizes.shape[-1] - 1)
    ids = first.gather(-1, unit) + place - (ends - sizes).gather(-1, unit)
    length = before + cut
    return ids.masked_fill_(place >= length, 0), before, length


def _fake_units(
    order: Tensor, start: Tensor, size: Tensor, room: Tensor | None, space: int, most: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = order.shape[:2]
    return order.new_empty((*shape, most + longest - 1)), order.new_empty((*shape, 1)), order.new_empty((*shape, 1))


_list_units: Callable[..., tuple[Tensor, Tensor, Tensor]] = register(
    "list_units(Tensor order, Tensor start, Tensor size, Tensor? room, SymInt space, SymInt most, SymInt longest) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=searched_units,
    cuda=listing.written_units,
    fake=_fake_units,
)


def list_units(order: Tensor, start: Tensor, size: Tensor, room: Tensor | int, most: int, longest: int) -> Listing:
    """The tokens of units order [B, H, K], best first, of which unit u has size[..., u] tokens from slot start[..., u] on;
    `longest` is the size of the largest."""
    return Listing(*_list_units(order, start, size, *_number(room), most, longest))


def _number(x: Tensor | int) -> tuple[Tensor | None, int]:
    """What may be a tensor or a number, as operators take it."""
    return (None, x) if isinstance(x, int) else (x, 0)


def taken(order: Tensor, size: Tensor, room: Tensor | int) -> Tensor:
    """How many tokens of each unit [B, H, U] are read when units order [B, H, K], best first, fill `room`."""
    sizes = size.gather(-1, order).long()
    read = (room - (sizes.cumsum(-1) - sizes)).clamp_(min=0).minimum(sizes)
    return torch.zeros_like(size, dtype=torch.int64).scatter_(-1, order, read)


def gathered_cut(
    q: Tensor,
    k: Tensor,
    ids: Tensor,
    before: Tensor | None,
    length: Tensor | None,
    fits: int,
    listed: int,
    scale: float,
    softcap: float,
    most: int,
    longest: int,
) -> Tensor:
    """What `cut` gives, by gathering the keys; the two lengths are in `fits` and `listed` where they are numbers."""
    lists, width = ids.shape[1:]
    start, stop = fits if before is None else before, listed if length is None else length
    place = (torch.arange(longest, device=ids.device) + start).expand(*ids.shape[:2], -1)
    inside = place < stop
    slots = ids.gather(-1, place.clamp(max=width - 1))
    s = _scaled(products(q, take(k, slots, k.shape[1])), scale, softcap)
    s = s.masked_fill(~inside.repeat_interleave(s.shape[1] // lists, 1), float("-inf"))
    score = s if lists == s.shape[1] else vote(s, lists)
    best = slots.gather(-1, sorted_top(score.masked_fill(~inside, float("-inf")), longest))
    j = torch.arange(most, device=ids.device).expand(*ids.shape[:2], -1)
    return torch.where(j < start, ids[..., :most], best.gather(-1, (j - start).clamp(0, longest - 1)))


def launched_cut(
    q: Tensor,
    k: Tensor,
    ids: Tensor,
    before: Tensor | None,
    length: Tensor | None,
    fits: int,
    listed: int,
    scale: float,
    softcap: float,
    most: int,
    longest: int,
) -> Tensor:
    """The same by `kvlib.kernels.listing.cut_unit`, unless a unit is longer than a program can hold."""
    run = listing.cut_lists if longest <= listing.LONGEST else gathered_cut
    return run(q, k, ids, before, length, fits, listed, scale, softcap, most, longest)


def _fake_cut(q: Tensor, k: Tensor, ids: Tensor, *numbers: int) -> Tensor:
    return ids.new_empty((*ids.shape[:2], numbers[-2]))


_cut: Callable[..., Tensor] = register(
    "cut(Tensor q, Tensor k, Tensor ids, Tensor? before, Tensor? length, SymInt fits, SymInt listed, float scale, "
    "float softcap, SymInt most, SymInt longest) -> Tensor",
    cpu=gathered_cut,
    cuda=launched_cut,
    fake=_fake_cut,
)


def cut(q: Tensor, k: Tensor, units: Listing, scale: float, softcap: float, most: int, longest: int) -> Tensor:
    """Slots [B, L, most] of a listing that are read: units that fit, then the best tokens of the unit that is cut, of which
    there are `longest` at most, by the votes of their true scores.

    q [B, Hq, d] are the query heads, k [B, H, T, d] the keys by slot; a list belongs to all heads (L = 1), to a KV head or
    to a query head, whose own score then decides.  Scores are scaled and capped as by `rank`.
    """
    before, length = _number(units.before), _number(units.length)
    return _cut(q, k, units.ids, before[0], length[0], before[1], length[1], scale, softcap, most, longest)


def examples() -> Iterator[Example]:
    """Launches to compile."""
    yield from ranking.examples()
    yield from listing.examples()
