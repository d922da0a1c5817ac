"""Every codec under every selector, on every tier: the host gives what the device gives, or the recipe is refused."""

import itertools

import numpy as np
import pytest
import torch

from kvlib.group import HeadGroup
from kvlib.kernels.rotary import Rotary
from kvlib.policies import RecipeError
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.testing import TinyTokenizer

SELECTORS = [
    "",
    "oracle(budget=48)",
    "quest(budget=48, page=4)",
    "clusterkv(budget=48, cluster=6)",
    "sentencekv(budget=48, r=inf)",
    "tokenselect(budget=48)",
    "double_sparsity(budget=48, factor=2)",
    "landmarks(budget=48, chunk=4, outliers=2)",
]
CODECS = [
    "kv4",
    "kv8(smooth=0.5)",
    "kivi(bits=2, group=8)",
    "kivi(k_bits=8, v_bits=2, group=0)",
    "gear(bits=4, group=8, s=0.25)",
    "gear(bits=2, group=8, s=0.25)",
    "gear_l(bits=4)",
    "rotated(bits=3)",
    "rotated(bits=2, levels=lloyd_max)",
    "mustafar",
    "hierarchical(group=8)",
    "low_rank(rank=12, chunk=4)",
    "lossless(page=4)",
    "kv(k='low_rank(rank=16, chunk=4)', v='gear_l(bits=2, group=8)')",
    "kv(k='full', v='rotated(bits=4)')",
]
TIERS = ["", " @ host", " @ host(attend=True)"]
ALONE = ("kv4", "kv8", "rotated", "mustafar", "gear_l(bits=4)", "kivi(k_bits=8", "kv(k='full'")  # of any number of tokens


IDS = torch.randint(3, 256, (2, 200), generator=torch.Generator().manual_seed(4))
ROTARY = Rotary(tuple(100.0 ** (-i / 8) for i in range(8)))


def ids_at(positions):
    return IDS[torch.arange(2).view(-1, 1, 1), positions.long()]


def group_of(recipe):
    return HeadGroup(
        recipe.evictor, recipe.sizes, ids_at, TinyTokenizer(), recipe.select, None, recipe.tier, recipe.codec, ROTARY
    )


def outputs(recipe):
    """A padded prompt of 90 and 71 tokens, 20 steps, and a second turn of 9 tokens."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 119, 16, generator=generator) for heads in (4, 2, 2))
    group, found = group_of(recipe), []
    with torch.no_grad():
        for lo, hi in [(0, 90), *((i, i + 1) for i in range(90, 110)), (110, 119)]:
            new = np.array([90, 71]) if lo == 0 else None
            found.append(group.forward(*(x[:, :, lo:hi] for x in (q, k, v)), new, Spec(0.25), False)[:, :, -1])
    return group, torch.stack(found, 2)


def refused(selector, codec, tier):
    """Whether a combination cannot work."""
    if codec.startswith("lossless") and (not tier or (selector and not selector.startswith(("quest", "landmarks")))):
        return True  # read by the page, on the CPU
    if selector.startswith("sentencekv") and not codec.startswith(ALONE):
        return True  # sentences end anywhere
    return "attend" in tier and selector.startswith(("oracle", "tokenselect"))  # they read every key, on the device


@pytest.mark.parametrize(("selector", "codec"), [*itertools.product(SELECTORS, CODECS)])
def test_the_host_gives_what_the_device_gives(selector, codec):
    found = []
    for tier in TIERS:
        text = " + ".join(filter(None, (selector, codec))) + ("" if selector else " + recent=8 + block=8") + tier
        if refused(selector, codec, tier):
            with pytest.raises(RecipeError):
                Recipe.parse(text)
            continue
        group, out = outputs(Recipe.parse(text))
        assert out.isfinite().all()
        assert group.body.counts.min() > 0
        assert any(place == "host" and x.numel() for place, _, x in group.body.storages()) == bool(tier), tier
        found.append(out)
    for out in found[1:]:
        torch.testing.assert_close(out, found[0], atol=2e-5, rtol=1e-4)
