"""One prompt for many recipes: each cache goes on as if it had read the prompt itself."""

import pytest
import torch

import kvlib
from kvlib.hf import Prompt
from kvlib.hf.prompt import own_positions
from kvlib.testing import prompts, tiny_model

RECIPES = [
    "full",
    "streaming_llm(sink=4, recent=24)",
    "h2o(budget=32)",
    "h2o_prefill(budget=0.25)",
    "snapkv(budget=32, window=8)",
    "snapkv(budget=0.3, window=16, adaptive=True)",
    "random(budget=0.25)",
    "oracle(budget=16)",
    "h2o(budget=24) @ host",
    "clusterkv(budget=24, cluster=6) @ host",
    "double_sparsity(budget=24, factor=2)",
    "quest(budget=24, page=4)",
    "duo_attention(sparsity=0.5, sink=4, recent=20)",
    "duo_attention(sparsity=0.5, sink=4, recent=20) + h2o(budget=24)",
    "duo_attention(sparsity=0.5, sink=4, recent=20) + oracle(budget=24)",
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def fed(model, ids, mask, cache):
    return model(ids, attention_mask=mask, position_ids=own_positions(mask, ids.shape[1]), past_key_values=cache).logits


@torch.no_grad()
def steps(model, cache, mask, count=20, seed=3):
    """Logits of `count` given tokens, one by one."""
    follow = torch.randint(3, 256, (len(mask), count), generator=torch.Generator().manual_seed(seed))
    outs = []
    for i in range(count):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        outs.append(fed(model, follow[:, i : i + 1], mask, cache))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_a_handed_over_prompt_is_a_prompt_read_alone(model, recipe):
    ids, mask = prompts()
    prompt = Prompt(model, RECIPES)
    first = prompt.read(ids, mask)
    handed = prompt.cache(recipe)
    alone = kvlib.Cache(model, recipe)
    expected = fed(model, ids, mask, alone)[:, -1]
    assert torch.allclose(first, expected, rtol=1e-5, atol=1e-5)
    got, wanted = steps(model, handed, mask), steps(model, alone, mask)
    if "duo" in recipe:  # heads are computed beside others: close, not the same bits
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got, wanted)
    assert torch.equal(handed.kept(), alone.kept())
    assert torch.equal(handed.attended(), alone.attended())
    assert handed.nbytes(used=True) == alone.nbytes(used=True)
    assert handed.get_seq_length() == alone.get_seq_length()


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_a_prompt_read_in_two_pieces_is_handed_over_at_either_end(model, recipe):
    """The second piece is read on top of the dense first one, also by methods that would have evicted between the two."""
    ids, mask = prompts()
    prompt = Prompt(model, RECIPES)
    prompt.read(ids[:, :80], mask[:, :80])
    early = prompt.cache(recipe)
    prompt.read(ids[:, 80:], mask)
    late = prompt.cache(recipe)
    for cache, until in ((early, 80), (late, ids.shape[1])):
        alone = kvlib.Cache(model, recipe)
        fed(model, ids[:, :until], mask[:, :until], alone)
        got, wanted = (steps(model, held, mask[:, :until]) for held in (cache, alone))
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(cache.kept(), alone.kept())


@torch.no_grad()
def test_sliding_layers_keep_their_stock_cache(model):
    model = tiny_model("Gemma2")
    ids, mask = prompts(pad=0)
    prompt = Prompt(model, ["snapkv(budget=32)"])
    prompt.read(ids)
    handed, alone = prompt.cache("snapkv(budget=32)"), kvlib.Cache(model, "snapkv(budget=32)")
    model(ids, past_key_values=alone)
    assert torch.equal(steps(model, handed, mask), steps(model, alone, mask))
    again = prompt.cache("snapkv(budget=32)")  # the first one's steps left the prompt alone
    assert torch.equal(steps(model, again, mask), steps(model, prompt.cache("snapkv(budget=32)"), mask))


@torch.no_grad()
def test_a_models_own_sinks_follow_their_heads():
    model, recipe = tiny_model("GptOss"), "duo_attention(sparsity=0.5, sink=4, recent=20) + snapkv(budget=32, window=8)"
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.linspace(-4, 6, 8)
    ids, mask = prompts(pad=0)
    prompt, alone = Prompt(model, [recipe]), kvlib.Cache(model, recipe)
    prompt.read(ids)
    fed(model, ids, mask, alone)
    assert torch.allclose(steps(model, prompt.cache(recipe), mask), steps(model, alone, mask), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_of_sliding_layers_alone_is_read():
    model = tiny_model("Mistral", sliding_window=24)
    ids, mask = prompts(pad=0)
    prompt = Prompt(model, ["full"])
    prompt.read(ids)
    alone = kvlib.Cache(model, "full")
    model(ids, past_key_values=alone)
    assert torch.equal(steps(model, prompt.cache("full"), mask), steps(model, alone, mask))


def test_what_cannot_be_shared_is_refused(model):
    with pytest.raises(ValueError, match=r"exact=True\) attends a prompt in its own way"):
        Prompt(model, ["streaming_llm(exact=True)"])
    prompt = Prompt(model, ["full"])
    with pytest.raises(ValueError, match="was not among the recipes"):
        prompt.cache("h2o(budget=32)")
    prompt.read(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match="one token alone"):
        prompt.read(torch.tensor([[5]]))
