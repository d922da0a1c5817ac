"""Needles for the tiny model that really retrieves; see tests/data/README.md."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

BOS, DOT, KEY, ASK = 1, 3, 7, 8
NAMES, NUMBERS, WORDS = range(32, 288), range(288, 388), range(388, 900)


def retriever():
    folder = Path(__file__).parent / "data" / "tiny_retriever"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def document(length, depth, seed):
    """(ids [1, length] that end in the question, its two-token answer): one needle at a depth in 0..1, six others."""
    g = torch.Generator().manual_seed(seed)

    def pick(pool, n):
        return [pool[i] for i in torch.randperm(len(pool), generator=g)[:n].tolist()]

    def needle(name):
        return [KEY, name, *pick(NUMBERS, 2), DOT]

    names = pick(NAMES, 7)
    wanted = needle(names[0])
    body = []
    while len(body) < length - 3 - 7 * 5:
        body += [*pick(WORDS, 7), DOT]
    body = body[: length - 3 - 7 * 5]
    places = [depth, *torch.rand(6, generator=g).tolist()]
    for at, statement in sorted(zip(places, [wanted, *map(needle, names[1:])], strict=True), reverse=True):
        cut = int(at * len(body)) // 8 * 8
        body[cut:cut] = statement
    ids = [BOS, *body, ASK, names[0]]
    return torch.tensor([ids]), wanted[2:4]


@torch.no_grad()
def right(model, make_cache, length=512, count=16, depths=(0.05, 0.6)):
    """How many of `count` needles are found, the question being part of the prompt."""
    found = 0
    for i in range(count):
        depth = depths[0] + (depths[1] - depths[0]) * i / max(1, count - 1)
        ids, answer = document(length, depth, seed=i)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=make_cache(),
            max_new_tokens=2,
            do_sample=False,
            eos_token_id=None,
        )
        found += out[0, -2:].tolist() == answer
    return found
