"""A model's rotary embedding, read and held against the keys it really puts into its cache."""

import pytest
import torch
from transformers import DynamicCache

import kvlib
from kvlib.hf.rope import rotary_of
from kvlib.testing import prompts, tiny_model

YARN = {"rope_type": "yarn", "factor": 32.0, "rope_theta": 15e4, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
}
FULL = {"layer_types": ["full_attention"] * 3}
CASES = [  # family, configuration, dimensions that rotate, attention_scaling, interleaved
    ("Llama", {}, 16, 1, False),
    ("Llama", {"rope_parameters": LLAMA3}, 16, 1, False),
    ("Llama", {"rope_parameters": YARN | {"attention_factor": 0.5}}, 16, 0.5, False),
    ("Qwen2", {}, 16, 1, False),
    ("Qwen3", {}, 16, 1, False),
    ("Mistral", {}, 16, 1, False),
    ("Mixtral", {}, 16, 1, False),
    ("Ministral3", {"sliding_window": None}, 16, 1, False),
    ("SmolLM3", {}, 16, 1, False),
    ("Phi3", {}, 16, 1, False),
    ("Phi3", {"partial_rotary_factor": 0.75}, 12, 1, False),
    ("Gemma2", {}, 16, 1, False),
    ("Gemma3", {"rope_parameters": BY_LAYER}, 16, 1, False),
    ("GptOss", {"rope_parameters": YARN}, 16, 1.3465736, False),
    ("Glm", {}, 8, 1, True),
    ("Glm4", {}, 8, 1, True),
    ("Cohere", {}, 16, 1, True),
    ("Cohere", {"use_qk_norm": True}, 16, 1, True),
    ("StableLm", {"head_dim": 8, "partial_rotary_factor": 0.5}, 4, 1, False),
    ("Phi", {"qk_layernorm": True, "head_dim": 8}, 4, 1, False),
]


@torch.no_grad()
def keys_of(model, ids, positions):
    """The last layer's keys [B, H, m, d] as its projection or norm makes them, and as they are in a stock cache."""
    config, made = model.config, []
    modules = dict(model.base_model.layers[2].self_attn.named_modules())
    name = next(n for n in ("k_norm", "k_layernorm", "k_proj", "qkv_proj") if n in modules)
    hook = modules[name].register_forward_hook(lambda module, args, out: made.append(out))
    cache = DynamicCache(config=config)
    model(ids, position_ids=positions, past_key_values=cache)
    hook.remove()
    turned = cache.layers[2].keys
    (bare,), (b, heads, m, d) = made, turned.shape
    if name == "qkv_proj":
        bare = bare[..., config.num_attention_heads * d :][..., : heads * d]
    if bare.dim() == 3:
        bare = bare.view(b, m, heads, d)
    return bare if bare.shape == turned.shape else bare.transpose(1, 2), turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "config", "rot", "scaling", "interleaved"), CASES)
def test_a_models_keys_are_turned_back_to_what_its_projection_made(family, config, rot, scaling, interleaved, dtype):
    model, ids = tiny_model(family, **config).to(dtype), prompts(2, 40, 0)[0]
    rotary = rotary_of(model)
    assert 2 * len(rotary.inv_freq) == rot
    assert rotary.scaling == pytest.approx(scaling)
    assert rotary.interleaved is interleaved
    positions = torch.stack([torch.arange(40), torch.arange(3000, 3040)])
    bare, turned = keys_of(model, ids, positions)
    assert turned.dtype == dtype
    top = bare.abs().max().float()
    # In bf16 a model rounds its cosines, its two products and their sum, each to 8 bits.
    close = 1e-5 if dtype == torch.float32 else 2**-6
    assert (turned - bare).abs().max() > 0.2 * top
    assert (rotary.turn_back(turned, positions[:, None]) - bare.float()).abs().max() <= close * top
    assert (rotary.turn(bare, positions[:, None]) - turned.float()).abs().max() <= close * top * max(1, scaling)


def test_layers_of_full_attention_are_read_where_each_type_has_its_own():
    rotary = rotary_of(tiny_model("Gemma3", rope_parameters=BY_LAYER))
    expected = [1e6 ** (-i / 8) / 8 for i in range(8)]
    assert rotary.inv_freq == pytest.approx(expected)


def test_frequencies_are_those_of_the_buffers_whatever_their_dtype():
    model = tiny_model()
    exact = rotary_of(model).inv_freq
    assert exact == tuple(model.model.rotary_emb.inv_freq.tolist())
    rounded = rotary_of(model.bfloat16()).inv_freq  # a cast rounds the buffers as well, and the model goes by them
    assert rounded != exact
    assert rounded == tuple(torch.tensor(exact).bfloat16().tolist())


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
REFUSED = [
    ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 64}, "opt", "no rotary embedding"),
    ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "llama", "'dynamic'"),
    ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64, "head_dim": 8}, "phi3", "'longrope'"),
    ("SmolLM3", {"num_hidden_layers": 4}, "smollm3", "layer 3 does not rotate"),
    ("Cohere2", FULL, "cohere2", "layer 0 does not rotate"),
    ("Mistral", {"sliding_window": 24}, "mistral", "none of its layers attends to everything"),
    ("GPTNeoX", {}, "gpt_neox", "do not take position_embeddings"),
    ("NanoChat", {}, "nanochat", "do not turn pairs of dimensions"),  # it turns them the other way
]


@pytest.mark.parametrize(("family", "config", "name", "reason"), REFUSED)
def test_models_that_one_fixed_rotation_does_not_describe_are_refused_by_name(family, config, name, reason):
    model = tiny_model(family, **config)
    with pytest.raises(ValueError, match=rf"shadowkv.*{name}'.*{reason}"):
        rotary_of(model)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("off", ["direction", "frequency"])
def test_every_layer_is_held_against_the_embedding(layer, off):
    model = tiny_model()
    attention = model.model.layers[layer].self_attn
    stock = attention.forward

    def other(hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        cos, sin = position_embeddings
        if off == "direction":
            sin = -sin
        else:
            cos, sin = (torch.cat([x[..., 1:], x[..., :1]], -1) for x in (cos, sin))
        return stock(hidden_states, (cos, sin), attention_mask, past_key_values=past_key_values, **kwargs)

    attention.forward = other
    with pytest.raises(ValueError, match="do not turn pairs of dimensions by the angles"):
        rotary_of(model)


@pytest.mark.parametrize("name", ["inv_freq", "attention_scaling"])
def test_numbers_the_embedding_does_not_go_by_are_not_believed(name):
    model = tiny_model("GptOss")
    embedding = model.model.rotary_emb
    stock = embedding.forward

    def other(*args):
        cos, sin = stock(*args)
        return (cos * 1.01, sin * 1.01) if name == "attention_scaling" else (cos.flip(-1), sin.flip(-1))

    rotary_of(model)
    embedding.forward = other
    with pytest.raises(ValueError, match="do not turn pairs of dimensions by the angles"):
        rotary_of(model)


def test_embeddings_of_another_kind_are_refused():
    model = tiny_model()
    model.model.rotary_emb.forward = lambda x, positions: torch.polar(torch.ones(1, 7, 8), torch.ones(1, 7, 8))
    with pytest.raises(ValueError, match="not one of cosines and sines"):
        rotary_of(model)
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(ValueError, match="no rotary embedding"):
        rotary_of(model)


def test_reading_leaves_the_model_the_generator_and_an_attached_cache_alone():
    model, (ids, mask) = tiny_model(), prompts()
    cache = kvlib.Cache(model, "h2o(budget=32)")
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False)
    kept, seen, state = cache.kept(), cache.get_seq_length(), torch.get_rng_state()
    with torch.inference_mode():
        rotary = rotary_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(cache.kept(), kept) and cache.get_seq_length() == seen
    assert model.config._attn_implementation == "kvlib"
    kvlib.detach(model)
    assert rotary_of(model) == rotary
