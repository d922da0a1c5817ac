"""Keys with planted structure: sentences about topics, in the layer shape of Llama-3-8B.

A key is a common offset (rotary channels of low frequency hardly turn, so real keys share one), the direction of its
sentence's topic, a smaller direction of the sentence's own, and noise.  Topics are a walk: each is like the next, less like
the one after, so that what a query asks for fades out instead of ending.  Its heads ask a little differently.  Sentences of
one topic are scattered over the whole text, so that what is asked for never stands side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KV_HEADS, GROUP, D = 8, 4, 128
END = 1  # id of the token that ends a sentence


@dataclass
class Planted:
    """k, v [1, 8, T, 128]; ids [T]; `query(i)` gives q [1, 32, 1, 128]."""

    tokens: int
    topics: int = 128
    seed: int = 0

    def __post_init__(self):
        make = torch.Generator().manual_seed(self.seed)
        rng = np.random.default_rng(self.seed)
        lengths = []
        while sum(lengths) < self.tokens:
            lengths.append(int(rng.integers(8, 41)))
        sentence = np.repeat(np.arange(len(lengths)), lengths)[: self.tokens]
        topic = rng.integers(self.topics, size=len(lengths))[sentence]
        ends = np.append(sentence[1:] != sentence[:-1], True)
        self.ids = torch.from_numpy(np.where(ends, END, 0))

        def directions(n):
            x = torch.randn(KV_HEADS, n, D, generator=make)
            return x / x.norm(dim=-1, keepdim=True)

        self.offset, self.topic = 6 * directions(1), directions(self.topics)
        for i in range(1, self.topics):
            self.topic[:, i] = 0.85 * self.topic[:, i - 1] + (1 - 0.85**2) ** 0.5 * self.topic[:, i]
        own = directions(len(lengths))
        noise = torch.randn(KV_HEADS, self.tokens, D, generator=make) * 0.3
        self.k = (self.offset + 5 * self.topic[:, topic] + 2.5 * own[:, sentence] + noise)[None]
        self.v = torch.randn(1, KV_HEADS, self.tokens, D, generator=make)

    def query(self, i: int) -> Tensor:
        """A query for topic i, its four heads near each other."""
        make = torch.Generator().manual_seed(1000 + i)
        wanted = self.topic[:, i % self.topics, None] + torch.randn(KV_HEADS, GROUP, D, generator=make) * 0.04
        return (wanted * 18).reshape(1, KV_HEADS * GROUP, 1, D)


class Tokenizer:
    """Two ids: a word and a full stop."""

    def __len__(self):
        return 2

    def get_vocab(self):
        return {"word": 0, ".": 1}

    def batch_decode(self, ids, **options):
        return ["".join("." if i == END else " word" for i in row) for row in ids]
