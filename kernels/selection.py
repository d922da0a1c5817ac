"""From scores of units to the tokens a query reads: votes of query heads, exact top-k, whole units and the one that is cut.

A unit is a set of tokens that stand side by side in their store: a page, a cluster, a sentence, one token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def top(score: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest of score [..., U] fp32, best first; ties go to the lower index, NaN counts as -inf.

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


def list_units(order: Tensor, start: Tensor, size: Tensor, room: Tensor | int, most: int, longest: int) -> Listing:
    """The tokens of units order [B, H, K], best first, of which unit u has size[..., u] tokens from slot start[..., u] on;
    `longest` is the size of the largest."""
    first, sizes = start.gather(-1, order).long(), size.gather(-1, order).long()
    ends = sizes.cumsum(-1)
    fits = ends <= room
    before = (sizes * fits).sum(-1, keepdim=True)
    whole = fits.sum(-1, keepdim=True)
    next_size = sizes.gather(-1, whole.clamp(max=sizes.shape[-1] - 1))
    cut = torch.where((before < room) & (whole < sizes.shape[-1]), next_size, 0)
    place = torch.arange(most + longest - 1, device=order.device).expand(*order.shape[:2], -1).contiguous()
    unit = torch.searchsorted(ends, place, right=True).clamp_(max=sizes.shape[-1] - 1)
    ids = first.gather(-1, unit) + place - (ends - sizes).gather(-1, unit)
    length = before + cut
    return Listing(ids.masked_fill_(place >= length, 0), before, length)


def taken(order: Tensor, size: Tensor, room: Tensor | int) -> Tensor:
    """How many tokens of each unit [B, H, U] are read when units order [B, H, K], best first, fill `room`."""
    sizes = size.gather(-1, order).long()
    read = (room - (sizes.cumsum(-1) - sizes)).clamp_(min=0).minimum(sizes)
    return torch.zeros_like(size, dtype=torch.int64).scatter_(-1, order, read)
