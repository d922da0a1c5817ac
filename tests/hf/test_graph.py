"""Decode steps that can be recorded, through a model: the tokens of plain decoding, row by row."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvlib
from kvlib import CapturedDecode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECIPES = [
    "full",
    "streaming_llm(sink=4, recent=40)",
    "quest(budget=96, page=8)",
    "duo_attention(sparsity=0.5) + quest(budget=96, page=8)",
    "snapkv(budget=64)",
]


def model_of(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        **options,
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval().to(DEVICE)


def prompt_of(rows=2, n=180):
    return torch.randint(1, 199, (rows, n), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def read(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_of_plain_decoding(recipe):
    model, ids = model_of(), prompt_of()
    plain, cache = kvlib.Cache(model, recipe), kvlib.Cache(model, recipe)
    token = read(model, plain, ids).argmax(-1)
    read(model, cache, ids)
    step = CapturedDecode(model, cache)
    for i in range(90):
        with torch.no_grad():
            position = torch.full((2, 1), 180 + i, device=DEVICE)
            expected = model(input_ids=token[:, None], past_key_values=plain, position_ids=position).logits[:, -1]
        found = step(token)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        token = expected.argmax(-1)
    assert cache.get_seq_length() == plain.get_seq_length() == 270
    assert torch.equal(cache.kept(), plain.kept())
    with torch.no_grad():  # and the model goes on by itself
        again = [model(input_ids=token[:, None], past_key_values=c).logits for c in (cache, plain)]
    torch.testing.assert_close(*again, atol=1e-4, rtol=1e-4)


def test_left_padded_rows():
    model, ids = model_of(), prompt_of()
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    plain, cache = kvlib.Cache(model, "full"), kvlib.Cache(model, "full")
    position = (mask.cumsum(1) - 1).clamp(min=0)
    for held in (plain, cache):
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=held)
    step, token = CapturedDecode(model, cache), torch.tensor([5, 7], device=DEVICE)
    for i in range(5):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        with torch.no_grad():
            at = torch.tensor([[180 + i], [110 + i]], device=DEVICE)
            expected = model(input_ids=token[:, None], attention_mask=mask, position_ids=at, past_key_values=plain)
        torch.testing.assert_close(step(token), expected.logits[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(
    DEVICE != "cuda", reason="CUDA graphs need a GPU; what they need is tested without one in test_steady.py"
)
def test_graphs_are_replayed_across_seals():
    model, ids = model_of(), prompt_of()
    cache = kvlib.Cache(model, "quest(budget=96, page=8)")
    token = read(model, cache, ids).argmax(-1)
    step = CapturedDecode(model, cache)
    for _ in range(200):
        token = step(token).argmax(-1)
    assert 1 <= step.recorded <= 8


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("h2o(budget=64)", "counts attention"),
        ("quest(budget=64) @ host", "moves bytes"),
        ("kv4", "take sizes from the host"),
        ("clusterkv(budget=64, cluster=8, estimate=True)", "leave estimate out"),
        ("quest(budget=96, page=8, every=2)", "remembers"),
    ],
)
def test_what_cannot_be_recorded_says_why(recipe, reason):
    model = model_of()
    cache = kvlib.Cache(model, recipe)
    read(model, cache, prompt_of())
    with pytest.raises(ValueError, match=reason):
        CapturedDecode(model, cache)


def test_rotary_embeddings_that_ask_the_device_are_refused():
    model = model_of(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    cache = kvlib.Cache(model, "full")
    read(model, cache, prompt_of())
    with pytest.raises(ValueError, match="'dynamic' asks the device"):
        CapturedDecode(model, cache)


def test_steps_of_what_was_made_in_inference_mode():
    model = model_of()
    cache = kvlib.Cache(model, "full")
    with torch.inference_mode():
        token = read(model, cache, prompt_of()).argmax(-1)
        step = CapturedDecode(model, cache)
    with torch.no_grad():
        assert step(token.clone()).isfinite().all()


def test_misuse_says_what_to_do():
    model = model_of()
    cache = kvlib.Cache(model, "full")
    with pytest.raises(ValueError, match="read the prompt first"):
        CapturedDecode(model, cache)
    read(model, cache, prompt_of())
    with pytest.raises(ValueError, match="one token per row"):
        CapturedDecode(model, cache)(torch.tensor([1]))
