"""See which tokens a head group reads: values are unit vectors of their positions, so its output is its attention."""

import numpy as np
import torch

from kvlib.group import HeadGroup
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.testing import TinyTokenizer

MOST = 384  # positions a row may reach
LETTER, COMMA, STOP = 0, 4, 7  # ids of `TinyTokenizer`


class Reader:
    """A head group of rows with the token ids [B, >= MOST] given, fed by hand."""

    def __init__(self, recipe, batch=1, ids=None, places=None, scale=1.0):
        recipe = Recipe.parse(recipe)
        self.batch, self.ids, self.spec = batch, ids, Spec(scale)
        evict, select = recipe.evictor, recipe.select
        self.group = HeadGroup(evict, recipe.sizes, self._ids_at, TinyTokenizer(), select, places, recipe.tier)

    def _ids_at(self, positions):
        rows = torch.arange(self.batch).view(-1, 1, 1)
        return self.ids[rows, positions.long()]

    def feed(self, q, k, new=None, **more):
        """Attention [B, Hq, n, MOST] of q [B, Hq, n, d] to every position, after taking in its keys k [B, H, n, d]; `new`,
        `recording` and `drafts` as for `HeadGroup.forward`."""
        n = k.shape[2]
        seen = self.group.tokens if len(self.group.tokens) else np.zeros(self.batch, dtype=np.int64)
        count = np.full(self.batch, n) if new is None else np.asarray(new)
        position = torch.from_numpy(seen + count - n)[:, None] + torch.arange(n)
        v = torch.nn.functional.one_hot(position.clamp(min=0), MOST).float()[:, None].expand(-1, k.shape[1], -1, -1)
        recording = more.pop("recording", False)
        given = None if new is None else count
        with torch.no_grad():
            return self.group.forward(q, k, v, given, self.spec, recording, **more)

    def steps(self, q, k):
        """Tokens one by one."""
        return torch.cat([self.feed(q[:, :, i : i + 1], k[:, :, i : i + 1]) for i in range(q.shape[2])], 2)

    @property
    def sealed(self):
        """First position [B] that is still in the tail."""
        return self.group.tokens - self.group.tail.lengths

    @property
    def sinks(self):
        """Sinks [B] that have left the tail."""
        return np.zeros_like(self.group.tokens) if self.group.sink is None else self.group.sink.counts[:, 0]


def positions(attention):
    """What one query row of one head read, attention [MOST]."""
    return attention.nonzero().flatten().tolist()


def shares(logits, rest):
    """The part of each head's softmax that goes to units, logits [heads, units], beside `rest` [heads, others], summed over
    the heads; in double precision."""
    both = torch.cat([logits, rest], -1).double()
    return (logits.double() - both.logsumexp(-1, keepdim=True)).exp().sum(0)


def best_first(score):
    """Units by descending score, ties by lower number."""
    return score.sort(descending=True, stable=True).indices
