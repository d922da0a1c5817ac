"""A plain model of a `Resident`, and scripts that hold one to it."""

import random
from contextlib import nullcontext
from math import prod

import torch
from torch import Tensor

from kvlib.offload.account import allocated
from kvlib.offload.resident import Resident
from tests.offload.streams import Streams

HEADS = 2
BYTES = 4 * 4 + 3 * 2 + 8  # of a token


class Host:
    """A body in host memory whose tokens all differ, in parts of several types and widths."""

    def __init__(self, batch, cap):
        self.seed = 0
        self.parts = {"k": torch.empty(batch, HEADS, 0, 4), "v": torch.empty(batch, HEADS, 0, 3, dtype=torch.bfloat16)}
        self.parts["scale"] = torch.empty(batch, HEADS, 0, dtype=torch.float64)
        self.grow(cap)

    def fresh(self, x, batch, tokens):
        self.seed += 1
        generator, shape = torch.Generator().manual_seed(self.seed), (batch, HEADS, tokens, *x.shape[3:])
        word = bits(x).dtype  # any bits, among them those of many a NaN
        least, most = torch.iinfo(word).min, torch.iinfo(word).max
        return torch.randint(least, most, shape, generator=generator, dtype=word).view(x.dtype)

    def grow(self, tokens):
        """Move to larger buffers."""
        self.parts = {n: torch.cat((x, self.fresh(x, len(x), tokens)), 2) for n, x in self.parts.items()}

    def rewrite(self, row, first, last):
        for x in self.parts.values():
            x[row, :, first:last] = self.fresh(x, 1, last - first)[0]


class Model:
    """The slots of one (row, head): what they hold and when that was fetched last; slot 0 is nobody's."""

    def __init__(self, run=(None,), used=(0,)):
        self.run, self.used = list(run), list(used)

    def reserve(self, room):
        more = room + 1 - len(self.run)
        self.run += [None] * more
        self.used += [0] * more

    def fetch(self, runs, now):
        """Slots and hits of `runs`, among which None is not valid."""
        slots = [self.run.index(r) if r is not None and r in self.run else 0 for r in runs]
        hits = [slot > 0 for slot in slots]
        for slot in slots:
            self.used[slot] = now
        victims = sorted((s for s in range(1, len(self.run)) if s not in slots), key=lambda s: (self.used[s], s))
        for i, r in enumerate(runs):
            if r is not None and not hits[i]:
                slots[i] = victims.pop(0)
                self.run[slots[i]], self.used[slots[i]] = r, now
        return slots, hits

    def forget(self, gone):
        for slot, r in enumerate(self.run):
            if r is not None and gone(r):
                self.run[slot], self.used[slot] = None, 0


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def tokens_of(units, run):
    return (units[..., None] * run + torch.arange(run, device=units.device)).flatten(2)


def expected(x, runs, shown, run):
    """The bits that the host has of `runs` [B, H, a] where `shown`, zeros elsewhere."""
    x = bits(x)  # gather turns one NaN into another
    index = tokens_of(torch.where(shown, runs, 0), run)
    want = x.gather(2, index.view(*index.shape, *[1] * (x.dim() - 3)).expand(*index.shape, *x.shape[3:]))
    want[~shown.repeat_interleave(run, -1)] = 0
    return want


class Script:
    """A resident, its host and its models through one life, on streams that are watched for races where `play` is given."""

    def __init__(self, run, play=None):
        self.run, self.play, self.now, self.counts = run, play or nullcontext(), 0, [0, 0]
        self.host, self.models = Host(2, 6 * run), [[Model() for _ in range(HEADS)] for _ in range(2)]
        self.resident = self.call(lambda: Resident(2, HEADS, run, "cpu"))
        self.reserve(3)

    def call(self, what, *arguments):
        """Do something on the device."""
        if isinstance(self.play, Streams):
            for x in self.host.parts.values():
                self.play.pin(x)
        with self.play:
            return what(*arguments)

    def each(self):
        return [model for row in self.models for model in row]

    def body(self):
        return self.host.parts["k"].shape[2] // self.run

    def ask(self, asked, seed, share):
        """Distinct runs of each head and which are valid, None for all; what is not valid is nonsense."""
        rng, asked = random.Random(seed), min(asked, self.resident.room, self.body())
        shape = (len(self.models), HEADS, asked)
        runs = torch.tensor([rng.sample(range(self.body()), asked) for _ in self.each()]).long().view(shape)
        valid = torch.tensor([share is None or rng.random() < share for _ in range(prod(shape))]).bool().view(shape)
        return torch.where(valid, runs, rng.choice([-7, 0, 10**9])), None if share is None else valid

    def abandon(self, asked, seed, share=None):
        """A fetch that nobody waits for, beside what the models say: runs, valid, slots, hits."""
        runs, valid = self.ask(asked, seed, share)
        fetch = self.call(self.resident.fetch, self.host.parts, runs, valid)
        self.now += 1
        valid = torch.ones_like(runs, dtype=torch.bool) if valid is None else valid
        lists = torch.where(valid, runs, -1).flatten(0, 1).tolist()
        both = [m.fetch([None if r < 0 else r for r in mine], self.now) for m, mine in zip(self.each(), lists, strict=True)]
        slots = torch.tensor([s for s, _ in both]).long().view(runs.shape)
        hits = torch.tensor([h for _, h in both]).bool().view(runs.shape)
        self.counts[0] += int(hits.sum())
        self.counts[1] += int(valid.sum() - hits.sum())
        return fetch, runs, valid, slots, hits

    def fetch(self, asked, seed, share):
        fetch, runs, valid, slots, hits = self.abandon(asked, seed, share)
        assert torch.equal(fetch.hit, hits)
        assert torch.equal(fetch.slots, slots * hits)
        self.check_contents(runs, fetch.slots, hits)
        # On a device with streams the host does not wait to learn what missed.
        exact = not isinstance(self.play, Streams)
        assert fetch.most_missing == (int((valid & ~hits).sum(-1).max()) if exact else runs.shape[-1])
        self.call(fetch.wait)
        assert torch.equal(fetch.slots, slots)
        self.check_contents(runs, fetch.slots, valid)

    def check_contents(self, runs, slots, shown):
        for name, x in self.host.parts.items():
            held = self.call(lambda name=name: self.resident.take(name, tokens_of(slots, self.run)))
            assert torch.equal(bits(held), expected(x, runs, shown, self.run))

    def reserve(self, room):
        self.call(self.resident.reserve, room, self.host.parts)
        for model in self.each():
            model.reserve(room)
        assert self.resident.room == len(self.models[0][0].run) - 1

    def grow(self, runs):
        self.host.grow(runs * self.run)

    def rewrite(self, row, first, runs):
        row, last = row % len(self.models), min(first + runs, self.body())
        if first < last:
            self.host.rewrite(row, first * self.run, last * self.run)
            self.call(self.resident.forget, row, first, last)
            for model in self.models[row]:
                model.forget(lambda r: first <= r < last)

    def shrink(self, counts, given_back):
        """Rows lose their newest runs, and those that all rows lost lose their memory."""
        counts = [min(counts[i % len(counts)], self.body()) for i in range(len(self.models))]
        self.call(self.resident.forget_from, torch.tensor(counts))
        for row, count in zip(self.models, counts, strict=True):
            for model in row:
                model.forget(lambda r, count=count: r >= count)
        for row, count in enumerate(counts):
            self.host.rewrite(row, count * self.run, self.body() * self.run)
        if given_back:
            self.host.parts = {n: x[:, :, : max(counts) * self.run].clone() for n, x in self.host.parts.items()}

    def give_back(self, runs):
        """Smaller buffers, without a word; what comes back later is something else."""
        runs = min(runs, self.body())
        self.host.parts = {n: x[:, :, : runs * self.run].clone() for n, x in self.host.parts.items()}
        self.fetch(0, 0, None)
        for model in self.each():
            model.forget(lambda r: r >= runs)

    def reorder(self, rows):
        rows = [r % len(self.models) for r in rows]
        self.call(self.resident.reorder, torch.tensor(rows))
        self.host.parts = {n: x[rows].clone() for n, x in self.host.parts.items()}
        self.models = [[Model(m.run, m.used) for m in self.models[r]] for r in rows]

    def copy(self, seed):
        """Go on with the twin or with the original, while the other one is put to other uses."""
        twin = self.call(self.resident.copy)
        other, self.resident = (self.resident, twin) if seed % 2 else (twin, self.resident)
        runs, _ = self.ask(3, seed, None)
        self.call(lambda: other.fetch({n: self.play_host(x + 1) for n, x in self.host.parts.items()}, runs).wait())
        self.call(other.forget, 0, 0, 2)
        self.call(other.clear)

    def play_host(self, x):
        return self.play.pin(x) if isinstance(self.play, Streams) else x

    def clear(self):
        self.call(self.resident.clear)
        self.counts = [0, 0]
        for model in self.each():
            model.forget(lambda r: True)

    def finish(self):
        self.play.may_stop = True
        hits, misses = self.counts
        assert self.call(self.resident.counts) == (hits, misses, misses * self.run * BYTES)
        held = [
            v for value in vars(self.resident).values() for v in (value.values() if isinstance(value, dict) else [value])
        ]
        assert allocated(self.resident.tensors()) == allocated(x for x in held if isinstance(x, Tensor))
