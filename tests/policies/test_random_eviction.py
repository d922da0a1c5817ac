"""Random eviction is random over positions, heads, layers and seeds, and over nothing else."""

import pytest
import torch

import kvlib
from kvlib.policies import RecipeError
from kvlib.testing import prompts, tiny_model


@torch.no_grad()
def held(recipe, rows=1, pad=0, seed=1):
    """Positions held after a prompt of 200: [row][layer * kv_heads + head]."""
    model = tiny_model()
    ids, mask = prompts(rows, 200, pad, seed)
    cache = kvlib.Cache(model, recipe)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.finish_prefill()
    layers = [layer.store.positions() for layer in cache.managed]
    return [[set(head.tolist()) for layer in layers for head in layer[row]] for row in range(rows)]


def test_every_head_and_layer_and_seed_chooses_for_itself():
    (choices,) = held("random(budget=50)")
    (others,) = held("random(budget=50, seed=1)")
    assert len(choices) == 6
    for i, choice in enumerate(choices):
        assert len(choice) == 50
        assert choice >= {0, 1, 2, 3}
        for other in [*choices[:i], *others]:
            assert len(choice & other) < 30  # 15 by chance, 50 if they were the same


def test_positions_are_drawn_evenly():
    (choices,) = held("random(budget=104) + sink=4")
    counts = torch.tensor(
        [[len([p for p in choice if 4 + 49 * i <= p < 4 + 49 * (i + 1)]) for i in range(4)] for choice in choices]
    )
    assert counts.sum() == 600
    assert ((counts.sum(0) - 150).abs() < 30).all()


@torch.no_grad()
def test_every_prompt_has_its_own_choice_whatever_its_neighbours_and_padding():
    model = tiny_model()
    ids, mask = prompts(2, 200, 20)
    together = kvlib.Cache(model, "random(budget=50)")
    model(ids, attention_mask=mask, past_key_values=together)
    together.finish_prefill()
    for row, start in ((0, 0), (1, 20)):
        alone = kvlib.Cache(model, "random(budget=50)")
        model(ids[row : row + 1, start:], past_key_values=alone)
        alone.finish_prefill()
        for one, other in zip(together.managed, alone.managed, strict=True):
            assert all(map(torch.equal, one.store.positions()[row], other.store.positions()[0]))
    (first,), (second,) = held("random(budget=50)"), held("random(budget=50)", seed=7)
    assert all(len(a & b) < 30 for a, b in zip(first, second, strict=True))


def test_bad_seeds_are_refused():
    for seed in ("-1", "0.5", "2147483648"):
        with pytest.raises(RecipeError, match="whole number"):
            kvlib.Recipe.parse(f"random(seed={seed})")
