"""Attaching, detaching, counting, copying, refusing."""

import copy
import gc
import re
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers

import kvlib
from kvlib.policies import BudgetedEvictor
from kvlib.policies.base import _METHODS, Needs
from kvlib.testing import prompts, tiny_model

GREEDY = {"max_new_tokens": 12, "do_sample": False}


def test_detach_gives_the_model_back_and_says_what_a_compressed_cache_needs():
    model, (ids, mask) = tiny_model(), prompts()
    before = model.config._attn_implementation
    stock = model.generate(ids, attention_mask=mask, **GREEDY)
    full, small = kvlib.Cache(model, "full"), kvlib.Cache(model, "h2o(budget=32)")
    for cache in (full, small):
        model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert model.config._attn_implementation == "kvlib"
    kvlib.detach(model)
    kvlib.detach(model)
    assert model.config._attn_implementation == before
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), stock)
    token, seen = stock[:, -1:], torch.nn.functional.pad(mask, (0, 12), value=1)
    with torch.no_grad():
        position = (seen.cumsum(-1) - 1).clamp(min=0)
        logits = model(token, attention_mask=seen, past_key_values=full, position_ids=position[:, -1:]).logits
        expected = model(stock, attention_mask=seen, position_ids=position).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match=r'set_attn_implementation\("kvlib"\)'):
        model(token, attention_mask=seen, past_key_values=small)
    kvlib.Cache(model, "full")  # attaches again, and the compressed cache works on
    model(token, attention_mask=seen, past_key_values=small)


def test_patch_makes_every_generate_use_a_cache():
    model, (ids, mask) = tiny_model(), prompts()
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    kvlib.patch(model, "h2o(budget=32)")
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert out.past_key_values.kept().max() <= 32
    kvlib.patch(model, "full")
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert str(out.past_key_values.recipe) == "full"
    assert torch.equal(out.sequences, plain)
    own = transformers.DynamicCache(config=model.config)
    model.generate(ids, attention_mask=mask, past_key_values=own, **GREEDY)
    assert own.get_seq_length() == 107
    kvlib.detach(model)
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert not isinstance(out.past_key_values, kvlib.Cache)
    assert "generate" not in vars(model)
    with pytest.raises(kvlib.RecipeError):
        kvlib.patch(model, "h2o(budget=0)")


def test_a_model_can_be_forgotten():
    model = tiny_model()
    kvlib.patch(model, "h2o(budget=32)")
    gone = weakref.ref(model)
    cache = kvlib.Cache(model, "full")
    del model
    gc.collect()
    assert gone() is None
    assert cache.implementation() == ""


def test_bytes_by_tier_part_and_use():
    model, (ids, mask) = tiny_model(), prompts()
    cache = kvlib.Cache(model, "h2o(budget=0.25)")
    assert cache.nbytes() == {"device": 0, "host": 0, "disk": 0}
    assert cache.kept().shape == (3, 0, 2)
    assert "none yet" in cache.report()
    model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    parts, used = cache.nbytes(by="part"), cache.nbytes(by="part", used=True)
    assert set(parts) == {"sink", "body", "tail", "index", "slots", "statistics", "staging", "stock"}
    assert sum(parts.values()) == cache.nbytes()["device"]
    assert all(used[name] <= parts[name] for name in parts)
    assert cache.kept().dtype == torch.long
    assert cache.kept().shape == (3, 2, 2)
    assert f"{cache.nbytes()['device']:,}" in cache.report()
    with pytest.raises(ValueError, match="by='layer'"):
        cache.nbytes(by="layer")


def test_sliding_layers_keep_their_stock_cache():
    model, (ids, mask) = tiny_model("Gemma3"), prompts()
    cache = kvlib.Cache(model, "duo_attention(sparsity=0.5, sink=2, recent=8) + h2o(budget=32)")
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "CacheLayer", "CacheLayer"]
    model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert (cache.kept()[0] == 23).all()  # the window, without the token that is being read
    assert cache.nbytes(by="part")["stock"] > 0
    assert not cache.streaming[0].any()
    assert cache.streaming.sum() == 2
    assert "1 sliding or linear layers keep their stock cache" in cache.report()
    sliding = tiny_model("Mistral", sliding_window=24)
    kvlib.Cache(sliding, "full")
    for recipe in ("h2o(budget=32)", "quest(budget=48)", "full @ host"):
        with pytest.raises(ValueError, match="sliding_window=None"):
            kvlib.Cache(sliding, recipe)


def test_copies_live_their_own_lives():
    model, (ids, mask) = tiny_model(), prompts()
    for recipe in ("full", "h2o(budget=32)"):
        prompt = kvlib.Cache(model, recipe)
        with torch.no_grad():
            model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=prompt)
        expected = model.generate(ids, attention_mask=mask, past_key_values=copy.deepcopy(prompt), **GREEDY)
        other = torch.cat([ids[:, :-1], ids[:, :1]], 1)
        model.generate(other, attention_mask=mask, past_key_values=copy.deepcopy(prompt), **GREEDY)
        assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=prompt, **GREEDY), expected)
    kvlib.detach(model)
    copy.deepcopy(prompt)
    assert model.config._attn_implementation != "kvlib"


def test_crop_without_notice():
    model, (ids, _) = tiny_model(), prompts(1, 96, 0)
    with torch.no_grad():
        full = kvlib.Cache(model, "full")
        a = model(ids, past_key_values=full).logits
        full.crop(-10)
        assert full.get_seq_length() == 86
        b = model(ids[:, 86:], past_key_values=full).logits
        torch.testing.assert_close(b, a[:, 86:], atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="negative"):
            full.crop(5)
        with pytest.raises(ValueError, match="newest 96"):
            full.crop(-97)
        small = kvlib.Cache(model, "h2o(budget=32)")
        model(ids, past_key_values=small)
        kept = small.kept()
        with pytest.raises(ValueError, match="activate_past_recording"):
            small.crop(-3)
        assert torch.equal(small.kept(), kept)
        assert small.get_seq_length() == 96


def test_a_mask_that_does_not_cover_the_tokens_is_refused():
    model, (ids, mask) = tiny_model(), prompts()
    cache = kvlib.Cache(model, "full")
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="96 columns for 97 tokens"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        hiding = torch.nn.functional.pad(mask, (0, 3), value=1)
        hiding[0, 40:46] = 0
        with pytest.raises(ValueError, match="hides 6 tokens of row 0"):
            model(ids[:, :3], attention_mask=hiding, past_key_values=cache)
        assert cache.get_seq_length() == 96
        with pytest.raises(ValueError, match="2-D padding mask"):
            model(ids[:, :1], attention_mask=torch.zeros(2, 1, 1, 97), past_key_values=cache)


def test_a_mask_moved_between_devices_is_read_again():
    """Hooks of `device_map` hand each layer a copy of the mask, without what was read from the original."""
    model, (ids, mask) = tiny_model(), prompts()
    expected = model.generate(ids, attention_mask=mask, past_key_values=kvlib.Cache(model, "h2o(budget=32)"), **GREEDY)
    hooks = [layer.self_attn.register_forward_pre_hook(_move_mask, with_kwargs=True) for layer in model.model.layers]
    out = model.generate(ids, attention_mask=mask, past_key_values=kvlib.Cache(model, "h2o(budget=32)"), **GREEDY)
    for hook in hooks:
        hook.remove()
    assert torch.equal(out, expected)


def _move_mask(module, args, kwargs):
    mask = kwargs["attention_mask"]
    return args, {**kwargs, "attention_mask": None if mask is None else mask.clone()}


def test_a_cache_of_another_model_is_noticed():
    mine, other, (ids, _) = tiny_model(), tiny_model(seed=2), prompts(1, 96, 0)
    with pytest.raises(RuntimeError, match="belongs to another model"), torch.no_grad():
        other(ids, past_key_values=kvlib.Cache(mine, "full"))
    cache = kvlib.Cache(mine, "full")
    hook = mine.model.layers[1].register_forward_pre_hook(_give_up)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        mine(ids, past_key_values=cache)
    hook.remove()
    cache.reset()
    with torch.no_grad():
        after = mine(ids, past_key_values=cache).logits
        assert torch.equal(after, mine(ids, past_key_values=kvlib.Cache(mine, "full")).logits)


def _give_up(*_):
    raise KeyboardInterrupt


def test_static_caches_work_on_an_attached_model():
    model, (ids, mask) = tiny_model(), prompts()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    kvlib.patch(model, "h2o(budget=32)")
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY), expected)


@pytest.mark.parametrize("family", ["Gemma2", "GptOss"])
def test_softcap_and_sinks_under_a_stock_cache(family):
    model, (ids, mask) = tiny_model(family), prompts(2, 150)
    model.set_attn_implementation("eager")
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    model.set_attn_implementation("kvlib")
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize("family", ["Gemma3", "GptOss"])
def test_refusals_leave_hybrid_models_as_they_were(family):
    model, (ids, mask) = tiny_model(family), prompts()
    cache = kvlib.Cache(model, "h2o(budget=32)")
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="reset"):
            model(ids[:1, :1], past_key_values=cache)
        full = kvlib.Cache(model, "full")
        model(ids, past_key_values=full)
        with pytest.raises(ValueError, match="sliding window"):
            full.crop(-3)
    for c in (cache, full):
        assert {layer.get_seq_length() for layer in c.layers} == {96}
    out = model.generate(ids, attention_mask=mask, past_key_values=kvlib.Cache(model, "h2o(budget=32)"), **GREEDY)
    cache.reset()
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY), out)


@torch.no_grad()
def test_a_right_padded_prompt_does_not_survive_detaching_silently():
    model, ids = tiny_model(), prompts(2, 96, 0)[0]
    mask = torch.ones_like(ids)
    mask[0, 80:] = 0
    cache = kvlib.Cache(model, "full")
    model(ids, attention_mask=mask, past_key_values=cache)
    kvlib.detach(model)
    with pytest.raises(RuntimeError, match="not one dense tensor"):
        model(ids[:, :1], attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), past_key_values=cache)


@pytest.mark.parametrize("recipe", ["full", "snapkv(budget=32, window=8)", "h2o(budget=32)"])
def test_a_row_that_ended_early_can_go_on(recipe):
    """In a batch, padding generated after a row's end is masked in the next turn."""
    model, (ids, mask) = tiny_model(), prompts()
    cache, lone = kvlib.Cache(model, recipe), kvlib.Cache(model, recipe)
    first = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    turn, seen = prompts(2, 9, 0, seed=8)[0], torch.nn.functional.pad(mask, (0, 12 + 9), value=1)
    seen[0, 96 + 5 : 108] = 0  # row 0 ended after five tokens
    both = torch.cat([first, turn], 1)
    if recipe.startswith("h2o"):  # its padding has voted
        with pytest.raises(ValueError, match="hides 6 tokens of row 0"):
            model.generate(both, attention_mask=seen, past_key_values=cache, **GREEDY)
        return
    out = model.generate(both, attention_mask=seen, past_key_values=cache, **GREEDY)
    model.generate(ids[:1], past_key_values=lone, max_new_tokens=6, do_sample=False)
    text = torch.cat([first[:1, :101], turn[:1]], 1)
    expected = model.generate(text, past_key_values=lone, **GREEDY)
    assert torch.equal(out[0, -21:], expected[0, -21:])


@torch.no_grad()
def test_a_one_shot_choice_is_not_taken_back():
    model, (ids, _) = tiny_model(), prompts(1, 96, 0)
    cache = kvlib.Cache(model, "snapkv(budget=32, window=8)")
    model(ids, past_key_values=cache)
    cache.finish_prefill()
    with pytest.raises(ValueError, match="left no mark"):
        cache.crop(-8)
    model(ids[:, :5], past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 96


def test_the_probe_outlives_detaching():
    model = tiny_model(max_position_embeddings=128)
    gates = kvlib.hf.induction_gates(model)
    kvlib.detach(model)
    assert kvlib.hf.induction_gates(model) is gates


def test_training_mode_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=re.escape("model.eval()")):
        kvlib.Cache(model.train(), "full")
    cache = kvlib.Cache(model.eval(), "full")
    model.train()
    with pytest.raises(RuntimeError, match=re.escape("model.eval()")):
        model(prompts()[0], past_key_values=cache)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("DeepseekV3", {"kv_lora_rank": 16, "q_lora_rank": 16, "first_k_dense_replace": 3}, "MLA"),
        ("JetMoe", {"num_local_experts": 2, "num_experts_per_tok": 2, "kv_channels": 16}, "change keys"),
        ("Qwen2", {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}, "M-RoPE"),
    ],
)
def test_families_that_cannot_work_are_refused_by_name(family, config, reason):
    model = tiny_model(family, **config)
    with pytest.raises(ValueError, match=rf"{model.config.model_type}.*{reason}"):
        kvlib.Cache(model, "full")


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=16, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        kvlib.Cache(transformers.T5ForConditionalGeneration(config).eval(), "full")


@pytest.fixture
def reader():
    """A method that reads text: keeps tokens whose ids are even, for as long as there is room."""

    @dataclass(frozen=True)
    class Reader(BudgetedEvictor):
        """Keep the even ids."""

        name: ClassVar[str] = "reader"
        needs: ClassVar[Needs] = Needs(token_ids=True, tokenizer=True)

        def score(self, view):
            return (view.token_ids % view.tokenizer == 0).float()

    kvlib.register(Reader)
    yield Reader
    del _METHODS["reader"]


def test_methods_that_read_text_get_ids_by_one_hook(reader):
    model, (ids, mask) = tiny_model(), prompts()
    with pytest.raises(kvlib.RecipeError, match="tokenizer="):
        kvlib.Cache(model, "reader(budget=40)")
    hooks = len(model.base_model._forward_pre_hooks)
    cache = kvlib.Cache(model, "reader(budget=40) + recent=8 + sink=0", tokenizer=2)
    kvlib.Cache(model, "reader(budget=40)", tokenizer=2)
    assert len(model.base_model._forward_pre_hooks) == hooks + 1
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=29, **GREEDY)
    for layer in cache.managed:
        for row, start in zip(layer.store.positions(), (0, 17), strict=True):
            text = ids[0 if start == 0 else 1, start:]
            for positions in row:
                old = positions[positions < len(text) - 8].long()
                wanted = (text[: len(text) - 8] % 2 == 0).nonzero().flatten()[:32]
                assert set(wanted.tolist()) <= set(old.tolist())
    beams = kvlib.Cache(model, "reader(budget=40)", tokenizer=2)
    model.generate(ids, attention_mask=mask, past_key_values=beams, num_beams=2, **GREEDY)
    embedded = model.get_input_embeddings()(out[:, -1:])
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=embedded, past_key_values=cache)
    kvlib.detach(model)
    assert len(model.base_model._forward_pre_hooks) == hooks


def test_old_transformers_are_refused(monkeypatch):
    monkeypatch.setattr(kvlib, "_installed", lambda name: "5.16.1")
    with pytest.raises(ImportError, match=r"5\.16\.1 is too old"):
        kvlib.__getattr__("Cache")


def test_a_model_spread_by_device_map(tmp_path):
    """Layers that are loaded when they run hand tensors through hooks; storage follows each layer's first keys."""
    model, (ids, mask) = tiny_model(), prompts()
    expected = model.generate(ids, attention_mask=mask, past_key_values=kvlib.Cache(model, "h2o(budget=32)"), **GREEDY)
    kvlib.detach(model)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    spread.generation_config.eos_token_id = None
    assert hasattr(spread.model.layers[1], "_hf_hook")
    out = spread.generate(ids, attention_mask=mask, past_key_values=kvlib.Cache(spread, "h2o(budget=32)"), **GREEDY)
    assert torch.equal(out, expected)
