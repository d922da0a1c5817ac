"""The cache under generate(): every mode, against the stock cache where nothing is given up."""

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache

import kvlib
from kvlib.testing import prompts, tiny_model
from tests.hf import oracle

GREEDY = {"max_new_tokens": 24, "do_sample": False}
FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "Glm4", "Gemma2", "Gemma3", "GptOss", "SmolLM3", "Mixtral"]
COMPRESSED = [
    "h2o(budget=32)",
    "h2o(budget=0.25, adaptive=True)",
    "snapkv(budget=32, window=8)",
    "streaming_llm(sink=4, recent=24)",
    "duo_attention(sparsity=0.5, sink=4, recent=16) + h2o(budget=32)",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_full_gives_the_stock_tokens_whole_chunked_and_padded(family):
    model, (ids, mask) = tiny_model(family), prompts()
    model.set_attn_implementation("eager" if family in ("Gemma2", "GptOss") else "sdpa")
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    stock = model(ids, attention_mask=mask).logits
    ours = model_logits(model, "full", ids, mask)
    real = mask.bool()
    assert (ours - stock)[real].abs().max() <= 1e-5 * stock[real].abs().max()
    for more in ({}, {"prefill_chunk_size": 29}):
        cache = kvlib.Cache(model, "full")
        assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY, **more), expected)


@torch.no_grad()
def model_logits(model, recipe, ids, mask):
    return model(ids, attention_mask=mask, past_key_values=kvlib.Cache(model, recipe)).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["h2o(budget=32)", "snapkv(budget=32, window=8)"])
def test_a_compressed_row_does_not_know_its_batch(family, recipe):
    model, (ids, mask) = tiny_model(family), prompts()
    out = model.generate(ids, attention_mask=mask, past_key_values=kvlib.Cache(model, recipe), **GREEDY)
    first = model.generate(ids[:1], past_key_values=kvlib.Cache(model, recipe), **GREEDY)
    second = model.generate(ids[1:, 17:], past_key_values=kvlib.Cache(model, recipe), **GREEDY)
    assert torch.equal(out[0], first[0])
    assert torch.equal(out[1, 17:], second[0])


FULL = {"layer_types": ["full_attention"] * 3}
ORACLES = [("Llama", {}), ("Qwen2", {}), ("Mistral", {}), ("Gemma2", FULL), ("GptOss", FULL)]


@pytest.mark.parametrize(("family", "config"), ORACLES)
@pytest.mark.parametrize("recipe", COMPRESSED)
@torch.no_grad()
def test_a_compressed_step_is_attention_over_exactly_what_is_held(family, config, recipe):
    """What `positions()` says is held is what a step attends to, per row and head, and nothing else."""
    model, (ids, mask) = tiny_model(family, **config), prompts()
    full = oracle.filled(model, ids, mask)
    cache = kvlib.Cache(model, recipe)
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:]
    cache.finish_prefill()
    for _ in range(14):
        token, mask = logits.argmax(-1), pad(mask, (0, 1), value=1)
        position = mask.sum(-1, keepdim=True) - 1
        oracle.show(cache, (0, 17), _window(cache))
        model.set_attn_implementation("kvlib")
        logits = model(token, attention_mask=mask, past_key_values=cache, position_ids=position).logits
        model.set_attn_implementation("kvlib_oracle")
        expected = model(token, attention_mask=mask, past_key_values=full, position_ids=position).logits
        assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert cache.kept().max() < 80


def _window(cache):
    """(sink, recent) of heads that see a window only, [layers][heads], else None."""
    streaming = cache.recipe.heads.streaming() if cache.recipe.heads else None
    other = cache.recipe.evict if cache.recipe.evict.name == "streaming_llm" else None
    return [[streaming if s else other for s in layer] for layer in cache.streaming]


@pytest.mark.parametrize("recipe", ["full", *COMPRESSED])
def test_beams_samples_and_several_sequences(recipe):
    model, (ids, mask) = tiny_model(), prompts()

    def make():
        return kvlib.Cache(model, recipe)

    beams = {"num_beams": 3, "max_new_tokens": 40, "do_sample": False}
    out = model.generate(ids, attention_mask=mask, past_key_values=make(), **beams)
    lone = model.generate(ids[1:, 17:], past_key_values=make(), **beams)
    assert torch.equal(out[1, 17:], lone[0])
    torch.manual_seed(3)
    sampled = model.generate(
        ids, attention_mask=mask, past_key_values=make(), do_sample=True, num_return_sequences=2, max_new_tokens=8
    )
    assert sampled.shape == (4, 104)
    if recipe == "full":
        kvlib.detach(model)
        assert torch.equal(out, model.generate(ids, attention_mask=mask, **beams))
        torch.manual_seed(3)
        stock = model.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=2, max_new_tokens=8)
        assert torch.equal(sampled, stock)


@pytest.mark.parametrize("recipe", ["full", *COMPRESSED])
def test_a_second_turn_is_fed_only_what_is_new(recipe):
    model, (ids, _) = tiny_model(), prompts()
    cache = kvlib.Cache(model, recipe)
    first = model.generate(ids[:1], past_key_values=cache, **GREEDY)
    fed = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    turn = torch.cat([first, ids[1:, 40:60]], 1)
    out = model.generate(turn, past_key_values=cache, **GREEDY)
    hook.remove()
    assert fed[0] == 21  # the last token of the first turn and twenty new ones
    assert cache.get_seq_length() == out.shape[1] - 1
    if recipe == "full":
        kvlib.detach(model)
        assert torch.equal(out, model.generate(turn, **GREEDY))


@pytest.mark.parametrize("recipe", ["full", "h2o_prefill(budget=32)", *COMPRESSED])
def test_assisted_decoding_gives_the_tokens_of_plain_decoding(recipe):
    model, draft, ids = tiny_model(), tiny_model(seed=3), prompts(1, 24, 0)[0].repeat(1, 4)
    model.generation_config.eos_token_id = draft.generation_config.eos_token_id = 2
    length = {"max_new_tokens": 60, "do_sample": False}
    expected = model.generate(ids, past_key_values=kvlib.Cache(model, recipe), **length)
    hooks = len(model._forward_pre_hooks)
    for more in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": draft}, {"assistant_model": copy_of(model)}):
        cache = kvlib.Cache(model, recipe)
        out = model.generate(ids, past_key_values=cache, **length, **more)
        assert torch.equal(out, expected)
        turn = torch.cat([out, prompts(1, 20, 0, seed=4)[0]], 1)  # a plain turn after an assisted one
        plain = kvlib.Cache(model, recipe)
        model.generate(ids, past_key_values=plain, **length)
        again = model.generate(turn, past_key_values=cache, max_new_tokens=20, do_sample=False)
        assert torch.equal(again, model.generate(turn, past_key_values=plain, max_new_tokens=20, do_sample=False))
        assert cache.nbytes(by="part")["staging"] == 0
    kvlib.detach(model)
    assert len(model._forward_pre_hooks) == hooks


def test_long_drafts_and_compressed_assistants():
    model, draft, ids = tiny_model(), copy_of(tiny_model()), prompts(1, 24, 0)[0].repeat(1, 4)
    model.generation_config.eos_token_id = 2
    length = {"max_new_tokens": 60, "do_sample": False}
    recipe = "h2o(budget=32)"
    expected = model.generate(ids, past_key_values=kvlib.Cache(model, recipe), **length)
    cache = kvlib.Cache(model, recipe)
    assert torch.equal(model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=200, **length), expected)
    kvlib.patch(draft, "h2o(budget=32)")
    cache = kvlib.Cache(model, recipe)
    assert torch.equal(model.generate(ids, past_key_values=cache, assistant_model=draft, **length), expected)


@pytest.mark.parametrize("recipe", ["h2o(budget=32)", "snapkv(budget=32, window=8)", "streaming_llm(sink=4, recent=24)"])
def test_assisted_in_inference_mode_then_on_without(recipe):
    model, ids = tiny_model(), prompts(1, 24, 0)[0].repeat(1, 4)
    cache, plain = kvlib.Cache(model, recipe), kvlib.Cache(model, recipe)
    length = {"max_new_tokens": 40, "do_sample": False}
    with torch.inference_mode():
        out = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **length)
    out = out.clone()
    assert torch.equal(model.generate(ids, past_key_values=plain, **length), out)
    turn = torch.cat([out, prompts(1, 20, 0, seed=4)[0]], 1)
    again = model.generate(turn, past_key_values=cache, **length)
    assert torch.equal(again, model.generate(turn, past_key_values=plain, **length))


def copy_of(model):
    """A draft model that is always right."""
    twin = tiny_model()
    twin.load_state_dict(model.state_dict())
    twin.generation_config.eos_token_id = 2
    return twin


def test_compiled_models_give_the_same_tokens():
    model, (ids, mask) = tiny_model(), prompts()
    for recipe in ("full", "h2o(budget=32)"):
        torch._dynamo.reset()
        expected = model.generate(ids, attention_mask=mask, past_key_values=kvlib.Cache(model, recipe), **GREEDY)
        cache = kvlib.Cache(model, recipe)
        step = torch.compile(model, backend="eager")
        seen, feed, tokens = mask, ids, []
        with torch.no_grad():
            for _ in range(24):
                position = (seen.cumsum(-1) - 1).clamp(min=0)[:, -feed.shape[1] :]
                feed = (
                    step(feed, attention_mask=seen, past_key_values=cache, position_ids=position).logits[:, -1:].argmax(-1)
                )
                tokens.append(feed)
                seen = pad(seen, (0, 1), value=1)
        assert torch.equal(torch.cat(tokens, 1), expected[:, 96:])


@pytest.mark.parametrize("recipe", ["full", "h2o(budget=32)"])
def test_inference_mode_no_grad_and_plain_calls_mix(recipe):
    model, (ids, mask) = tiny_model(), prompts()
    cache, again = kvlib.Cache(model, recipe), kvlib.Cache(model, recipe)
    for c, modes in ((cache, [torch.inference_mode, torch.no_grad, torch.enable_grad]), (again, [torch.no_grad] * 3)):
        seen, feed, outs = mask, ids, []
        for i in range(60):
            with modes[i % 3]():
                logits = model(feed, attention_mask=seen, past_key_values=c).logits
            feed = logits[:, -1:].detach().clone().argmax(-1)
            outs.append(feed)
            seen = pad(seen, (0, 1), value=1)
        tokens = torch.cat(outs, 1)
        if c is cache:
            expected = tokens
    assert torch.equal(tokens, expected)


def test_attention_by_name_serves_stock_caches_and_no_cache(tmp_path):
    model, (ids, mask) = tiny_model(), prompts()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    model.save_pretrained(tmp_path)
    named = type(model).from_pretrained(tmp_path, attn_implementation="kvlib")
    named.generation_config.eos_token_id = None
    assert named.config._attn_implementation == "kvlib"
    assert torch.equal(named.generate(ids, attention_mask=mask, **GREEDY), expected)
    stock = DynamicCache(config=named.config)
    assert torch.equal(named.generate(ids, attention_mask=mask, past_key_values=stock, **GREEDY), expected)
    assert torch.equal(
        named.generate(ids, attention_mask=mask, past_key_values=kvlib.Cache(named, "full"), **GREEDY), expected
    )
    chunks = {"prefill_chunk_size": 29, **GREEDY}
    assert torch.equal(named.generate(ids, attention_mask=mask, **chunks), expected)


@pytest.mark.parametrize("recipe", ["full", "h2o(budget=32)", "snapkv(budget=32, window=8)"])
def test_padding_inside_and_after_a_chunk_is_as_if_it_were_not_there(recipe):
    """Second turns of a batch are padded in the middle of the conversation."""
    model, (ids, mask) = tiny_model(), prompts()
    turn, holes = prompts(2, 20, 0, seed=7)[0], torch.ones(2, 20, dtype=torch.long)
    holes[0, 15:] = 0
    holes[1, :6] = 0
    cache = kvlib.Cache(model, recipe)
    both = torch.cat([mask, holes], 1)
    position = (both.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, position_ids=position[:, :96])
        out = model(turn, attention_mask=both, past_key_values=cache, position_ids=position[:, 96:]).logits
        for row, real in ((0, slice(0, 15)), (1, slice(6, 20))):
            lone = kvlib.Cache(model, recipe)
            start = 17 * row
            model(ids[row : row + 1, start:], past_key_values=lone)
            expected = model(turn[row : row + 1, real], past_key_values=lone).logits
            torch.testing.assert_close(out[row : row + 1, real], expected, atol=1e-5, rtol=1e-4)
    seen = cache.managed[0].store.groups[0].tokens.tolist()
    assert seen == [96 + 15, 79 + 14]
    with torch.no_grad():  # and what the padding's queries might have voted for shows in what is evicted later
        for row, real in ((0, slice(0, 15)), (1, slice(6, 20))):
            both_ids = torch.cat([ids[row : row + 1, 17 * row :], turn[row : row + 1, real]], 1)
            lone, rows = kvlib.Cache(model, recipe), kvlib.Cache(model, recipe)
            model(both_ids[:, :-14] if row else both_ids[:, :-15], past_key_values=lone)
            model(both_ids[:, -14:] if row else both_ids[:, -15:], past_key_values=lone)
            model(ids, attention_mask=mask, past_key_values=rows, position_ids=position[:, :96])
            model(turn, attention_mask=both, past_key_values=rows, position_ids=position[:, 96:])
            for i in range(24):
                step = turn[row : row + 1, i % 20 : i % 20 + 1]
                at = lone.get_seq_length()
                a = model(step, past_key_values=lone).logits
                b = model(step.expand(2, 1), past_key_values=rows, position_ids=torch.full((2, 1), at)).logits[
                    row : row + 1
                ]
                torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)
            lone_held, held = lone.managed[0].store.positions()[0], rows.managed[0].store.positions()[row]
            assert all(torch.equal(x, y) for x, y in zip(lone_held, held, strict=True))


@pytest.mark.parametrize("recipe", ["full", "h2o(budget=32)", "snapkv(budget=32, window=8)", "oracle(budget=20)"])
@torch.no_grad()
def test_columns_that_are_padding_in_every_row(recipe):
    """A chunk may have more columns than any row has tokens."""
    model, (ids, _) = tiny_model(), prompts(2, 96, 0)
    mask = torch.ones_like(ids)
    mask[0, :80] = 0
    mask[1, 70:] = 0
    mask[1, :60] = 0
    ids = torch.where(mask.bool(), ids, 0)
    follow = prompts(2, 30, 0, seed=7)[0]
    cache = kvlib.Cache(model, recipe)
    outs = []
    for i in range(31):
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        outs.append(model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1])
        ids, mask = follow[:, i : i + 1], torch.nn.functional.pad(mask, (0, 1), value=1)
    for row, real in ((0, slice(80, 96)), (1, slice(60, 70))):
        lone = kvlib.Cache(model, recipe)
        expected = [model(prompts(2, 96, 0)[0][row : row + 1, real], past_key_values=lone).logits[:, -1]]
        expected += [model(follow[row : row + 1, i : i + 1], past_key_values=lone).logits[:, -1] for i in range(30)]
        start = 1 if row else 0  # what padding after a row's last token predicts is nobody's business
        got = torch.stack(outs, 1)[row : row + 1, start:]
        torch.testing.assert_close(got, torch.stack(expected, 1)[:, start:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", COMPRESSED)
def test_a_long_row_beside_one_that_fits_the_budget(recipe):
    model, (ids, _) = tiny_model(), prompts(2, 96, 0)
    mask = torch.ones_like(ids)
    mask[1, :78] = 0
    out = model.generate(ids, attention_mask=mask, past_key_values=kvlib.Cache(model, recipe), **GREEDY)
    for row, start in ((0, 0), (1, 78)):
        lone = model.generate(ids[row : row + 1, start:], past_key_values=kvlib.Cache(model, recipe), **GREEDY)
        assert torch.equal(out[row, start:], lone[0])
