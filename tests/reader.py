"""A head group whose values name their tokens, so that its output says what was read; and what should be, written out."""

import numpy as np
import torch

from kvlib.group import HeadGroup
from kvlib.recipe import Recipe
from kvlib.segment import Spec

SPEC = Spec(0.25)


def cloud(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Reader:
    """Feeds `heads` KV heads under a recipe, the model's first .. first + heads - 1; outputs are the attention
    probabilities by position, [B, Hq, n, size]."""

    def __init__(self, recipe, heads=1, size=320, spec=SPEC, first=0):
        recipe = Recipe.parse(recipe)
        at = first + np.arange(heads)
        self.group = HeadGroup(recipe.evictor, recipe.sizes, selector=recipe.select, heads=at, tier=recipe.tier)
        self.heads, self.spec, self.eye = heads, spec, torch.eye(size)

    def feed(self, q, k, new=None, recording=False):
        """Take in a chunk q [B, Hq, n, d], k [B, H, n, d] of which the last new[r] columns of row r are tokens."""
        batch, heads, n, _ = k.shape
        seen = self.group.tokens if len(self.group.tokens) else np.zeros(batch, dtype=np.int64)
        count = np.full(batch, n) if new is None else np.asarray(new)
        place = torch.from_numpy(seen + count - n)[:, None] + torch.arange(n)
        v = self.eye[place.clamp(min=0)][:, None].expand(-1, heads, -1, -1)
        return self.group.forward(q, k, v, None if new is None else count, self.spec, recording)

    def fill(self, k):
        """Take in a prompt k [B, H, n, d] of which no query is asked for, and end it."""
        self.group.spec = self.spec
        self.group.take_in(k, self.eye[: k.shape[2]].expand(*k.shape[:2], -1, -1), None)
        self.group.finish_prefill()

    def ask(self, q, k=None):
        """Attention of a token, of key zero unless given, that is taken back afterwards, [B, Hq, size]."""
        out = self.feed(q, q.new_zeros(len(q), self.heads, 1, q.shape[3]) if k is None else k, recording=True)
        self.group.crop(1)
        return out[:, :, 0]

    def steps(self, q, k, first):
        """Feed what is left of q and k from token `first` on one by one, [B, Hq, n, size]."""
        return torch.cat([self.feed(q[:, :, t : t + 1], k[:, :, t : t + 1]) for t in range(first, k.shape[2])], 2)

    def split(self):
        """Tokens among the sinks, in the body and in all, of the first row."""
        sinks = 0 if self.group.sink is None else int(self.group.sink.counts[0, 0])
        body = 0 if self.group.body is None else int(self.group.body.counts[0])
        return sinks, body, int(self.group.tokens[0])

    def members(self, row=0):
        """Positions of the tokens of every unit, [heads][units]."""
        body = self.group.body
        start, size = body.units.parts["start"][row], body.units.parts["size"][row]
        units = range(int(body.units.counts[row]))
        found = []
        for h in range(self.heads):
            at = body.positions(row, h).tolist()
            found.append([at[int(start[h, u]) : int(start[h, u] + size[h, u])] for u in units])
        return found


def together(recipe, q, k, lengths, rows, steps, heads=1):
    """Some rows of q [R, Hq, T, d] and k: their prompts, left padded, and then steps, [rows, Hq, steps, size]."""
    n = max(lengths[r] for r in rows)
    reader, count = Reader(recipe, heads), [lengths[r] for r in rows]

    def padded(x):
        return torch.stack(
            [torch.nn.functional.pad(x[r, :, : lengths[r]], (0, 0, n - lengths[r], 0), value=9.0) for r in rows]
        )

    reader.feed(padded(q), padded(k), None if min(count) == n else count)
    follow = [torch.stack([x[r, :, lengths[r] : lengths[r] + steps] for r in rows]) for x in (q, k)]
    return reader.steps(*follow, 0), reader


def places(mask):
    """Positions marked in a mask [size]."""
    return mask.nonzero().flatten().tolist()


def attention_over(read, q, k):
    """Probabilities [size] of a query q [d] over the keys k [T, d] it reads."""
    p = torch.zeros(read.shape)
    p[read] = ((k[places(read)] @ q) * SPEC.scale).softmax(-1)
    return p


def lists_of(scope, q_heads, heads):
    """Which query heads share a list."""
    each = {"query_head": q_heads, "kv_head": heads, "layer": 1}[scope]
    return np.arange(q_heads).reshape(each, -1).tolist()


def ranked(promised, q, k, always, sharing, spec=SPEC):
    """The order of units on which the query heads `sharing` a list agree: by the sum of their softmax over the units and
    what is read in any case; ties by the lower unit.

    promised: unscaled scores of the units by each of these heads; q [Hq, d]; k [Hq, T, d], the keys as each query head sees
    them; always: positions.
    """
    votes = np.zeros(len(promised[sharing[0]]))
    for h in sharing:
        s = np.concatenate([np.asarray(promised[h]), (k[h, always].double() @ q[h].double()).numpy()]) * spec.scale
        s = s if spec.softcap is None else spec.softcap * np.tanh(s / spec.softcap)
        s = s if spec.sinks is None else np.append(s, spec.sinks[h])
        p = np.exp(s - np.logaddexp.reduce(s))[: len(votes)]
        votes += s[: len(votes)] if len(sharing) == 1 else p
    return sorted(range(len(votes)), key=lambda u: (-votes[u], u))


def check_read(read, order, units, always, room, q, k, sharing, spec=SPEC):
    """`read` holds what is read in any case, the best units that fit, and of the next one its best tokens: those of the
    largest sum of softmax over its tokens."""
    whole, cut, left = list(always), [], room
    for unit in (units[u] for u in order):
        if len(unit) > left:
            cut = unit
            break
        whole += unit
        left -= len(unit)
    read, left = set(places(read)), left if cut else 0
    assert set(whole) <= read <= {*whole, *cut}
    assert len(read) == len(whole) + left
    if left:
        s = torch.stack([k[h, cut].double() @ q[h].double() for h in sharing]) * spec.scale
        s = s if spec.softcap is None else spec.softcap * (s / spec.softcap).tanh()
        best = dict(zip(cut, s.softmax(-1).sum(0).tolist(), strict=True))
        assert read - set(whole) == set(sorted(cut, key=lambda t: -best[t])[:left])
