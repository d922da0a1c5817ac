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


def test_neither_neighbours_nor_text_nor_padding_matter():
    (alone,) = held("random(budget=50)")
    two = held("random(budget=50)", rows=2, pad=0, seed=7)
    assert two[0] == two[1] == alone
    padded = held("random(budget=50)", rows=2, pad=20, seed=7)
    assert padded[0] == alone
    assert all(max(choice) < 180 for choice in padded[1])


def test_bad_seeds_are_refused():
    for seed in ("-1", "0.5", "2147483648"):
        with pytest.raises(RecipeError, match="whole number"):
            kvlib.Recipe.parse(f"random(seed={seed})")
