"""Channel tables and the calibration that makes them."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvlib
from kvlib.channels import identify_channels, text_blocks
from kvlib.eval import load
from kvlib.policies.select.channels import FORMAT, ChannelTable, channel_weight
from kvlib.testing import prompts, tiny_model


def table(layers=2, kv_heads=2, d=4):
    weight = np.random.default_rng(0).random((layers, kv_heads, d))
    return ChannelTable.of(weight, "test", {"model": "llama", "blocks": 3})


@torch.no_grad()
def stock_queries_and_keys(model, ids):
    """Post-rotary (q, k) of every layer, from transformers' own modules and cache."""
    queries, cache = [], DynamicCache(config=model.config)

    def take(module, _, kwargs):
        q = module.q_proj(kwargs["hidden_states"]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        queries.append(apply_rotary_pos_emb(q, q, *kwargs["position_embeddings"])[0])

    hooks = [layer.self_attn.register_forward_pre_hook(take, with_kwargs=True) for layer in model.base_model.layers]
    kvlib.detach(model)
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    return [(q, layer.keys) for q, layer in zip(queries, cache.layers, strict=True)]


def plain_weight(q, k):
    """The definition, query head h reading KV head h // G: mean over tokens of |sum over the group of q * k|, [H, d]."""
    group = q.shape[1] // k.shape[1]
    product = q.double() * k.double().repeat_interleave(group, 1)
    summed = torch.stack([product[:, h : h + group].sum(1) for h in range(0, q.shape[1], group)], 1).abs()
    return summed.mean((0, 2))


def test_weight_known_answer():
    q = torch.tensor([[[[1.0, 2.0], [3.0, -1.0]], [[1.0, -3.0], [-3.0, 2.0]]]])  # two query heads, two tokens
    k = torch.tensor([[[[2.0, 1.0], [5.0, -4.0]]]])
    assert channel_weight(q, k).tolist() == [[[4.0, 1.0 + 4.0]]]  # |(1+1)2| + |(3-3)5|, |(2-3)1| + |(-1+2)(-4)|


def test_query_heads_are_summed_by_their_own_kv_head():
    q, k = torch.randn(3, 12, 17, 8), torch.randn(3, 4, 17, 8)
    got = channel_weight(q.transpose(1, 2).contiguous().transpose(1, 2), k)
    assert got.shape == (3, 4, 8)
    torch.testing.assert_close(got.sum(0).double() / (3 * 17), plain_weight(q, k), atol=1e-6, rtol=1e-5)


def test_weight_is_fp32_whatever_comes():
    q, k = torch.randn(1, 4, 300, 8).half(), torch.randn(1, 2, 300, 8).half()
    got = channel_weight(30 * q, 30 * k)  # sums far beyond fp16
    assert got.dtype == torch.float32
    assert torch.equal(got, channel_weight((30 * q).float(), (30 * k).float()))


def test_padding_is_left_out():
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :5] = False
    q[1, :, :5], k[1, :, :5] = float("nan"), float("inf")
    got = channel_weight(q, k, real)
    torch.testing.assert_close(got[:1], channel_weight(q[:1], k[:1]))
    torch.testing.assert_close(got[1:], channel_weight(q[1:, :, 5:], k[1:, :, 5:]))


def test_the_order_follows_the_weights_wherever_the_channels_lie():
    q, k, shuffle = torch.randn(1, 4, 50, 16), torch.randn(1, 2, 50, 16), torch.randperm(16)
    one = ChannelTable.of(channel_weight(q, k).numpy(), "")
    other = ChannelTable.of(channel_weight(q[..., shuffle], k[..., shuffle]).numpy(), "")
    assert np.array_equal(shuffle.numpy()[other.order], one.order)
    assert not np.array_equal(other.order, one.order)
    assert ChannelTable.of(np.array([[[0.5, 2.0, 0.5, 0.0, 3.0]]]), "").order.tolist() == [[[4, 1, 0, 2, 3]]]


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_models_channels_are_weighed_after_the_rotation(family):
    model, ids = tiny_model(family), prompts(2, 40, 0)[0]
    found = identify_channels(model, ids)
    assert found.weight.shape == (3, 2, 16)
    for layer, (q, k) in enumerate(stock_queries_and_keys(model, ids)):
        np.testing.assert_allclose(found.weight[layer], plain_weight(q, k).numpy(), rtol=1e-4)
        assert np.array_equal(found.order[layer], np.argsort(-found.weight[layer], -1))
    assert found.header == {"model": model.config.model_type, "blocks": 2, "length": 40}


def test_blocks_count_alike():
    model, ids = tiny_model(), prompts(3, 32, 0)[0]
    both, steps = identify_channels(model, ids[:2]).weight, []
    one, other = (identify_channels(model, ids[i : i + 1]).weight for i in (0, 1))
    np.testing.assert_allclose(both, (one + other) / 2, rtol=1e-6)
    assert not np.allclose(one, other, rtol=0.01)
    again = identify_channels(model, ids[[1, 0, 2]], steps.append)
    np.testing.assert_allclose(again.weight, identify_channels(model, ids).weight, rtol=1e-6)
    assert steps == [0, 1, 2]


def test_layers_with_a_window_are_not_looked_at():
    found = identify_channels(tiny_model("Gemma2"), prompts(1, 40, 0)[0])
    assert (found.weight[0] == 0).all() and (found.weight[1:] > 0).all()
    assert (found.order[0] == np.arange(16)).all()
    with pytest.raises(ValueError, match="sliding_window=None"):
        identify_channels(tiny_model("Mistral", sliding_window=16), prompts(1, 40, 0)[0])
    with pytest.raises(ValueError, match=r"\(40,\).*blocks"):
        identify_channels(tiny_model(), prompts(1, 40, 0)[0][0])


def test_the_first_channels_find_more_of_the_best_keys_than_the_last():
    model, tokenizer = load("tiny")
    found = identify_channels(model, text_blocks(tokenizer, None, 4, 128))
    heard = stock_queries_and_keys(model, text_blocks(tokenizer, None, 1, 256, seed=1))

    def recall(order):
        shares = []
        for layer, (q, k) in enumerate(heard):
            for h, queries in enumerate(q[0, :, -64:]):
                kv_head = h // (q.shape[1] // k.shape[1])
                keys, channels = k[0, kv_head], order[layer, kv_head, : k.shape[3] // 4].copy()
                true, guess = ((queries[:, c] @ keys[:, c].T).topk(16).indices for c in (slice(None), channels))
                shares.append((true[:, :, None] == guess[:, None]).any(-1).float().mean())
        return float(torch.stack(shares).mean())

    assert recall(found.order) > 1.5 * recall(found.order[..., ::-1])


def test_text_blocks_follow_the_seed():
    _, tokenizer = load("tiny")
    ids, same, other = (text_blocks(tokenizer, None, 3, 50, seed) for seed in (0, 0, 1))
    assert ids.shape == (3, 50)
    assert torch.equal(ids, same) and not torch.equal(ids, other) and not torch.equal(ids[0], ids[1])


def test_file_round_trip(tmp_path):
    saved = table()
    saved.save(tmp_path / "channels.tsv")
    again = ChannelTable.load(tmp_path / "channels.tsv")
    assert np.array_equal(again.order, saved.order)
    np.testing.assert_allclose(again.weight, saved.weight, rtol=1e-5)
    assert (again.header, again.source) == (saved.header, str(tmp_path / "channels.tsv"))
    _, *rows = (tmp_path / "channels.tsv").read_text().splitlines()
    assert [row.split("\t")[0].split(":")[0] for row in rows] == [str(c) for c in saved.weight.argmax(-1).ravel()]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", "no channel table"),
        (lambda text: "hello\n" + text, "no channel table"),
        (lambda text: text.replace(FORMAT, "kvlib-head-table-1"), f"no channel table.*{FORMAT}"),
        (lambda text: text.replace(":", ";", 20), "no channel table"),
        (lambda text: text.replace("\t2:", "\tx:", 1), "no channel table.*'x'"),
        (lambda text: text.replace("\t2:", "\t3:", 1), "layer 0, KV head 0 does not list channel 2: list each"),
        (lambda text: text.replace("\t2:", "\t-1:", 1), "does not list channel 2"),
        (lambda text: text.replace("\t2:", "\t99999999999999999999:", 1), "does not list channel 2"),
        (lambda text: text.replace("\t2:", "\t2:-", 1), "weight is -.*0 or more"),
        (lambda text: text.replace("\t2:", "\t2:nan\t2:", 1), r"\[4, 5\] channels"),
        (lambda text: "\n".join(text.splitlines()[:-1]), r"\[2, 2, 4\] and it has 3 lines"),
        (lambda text: text.replace("[2, 2, 4]", "[2, 2, 5]"), r"\[2, 2, 5\].*\[4\] channels"),
        (lambda text: text.replace("[2, 2, 4]", "null"), "is None"),
        (lambda text: text.replace("[2, 2, 4]", "[4, 4]"), r"is \[4, 4\]"),
    ],
)
def test_a_file_that_is_none_names_what_is_wrong_and_the_remedy(tmp_path, change, words):
    path = tmp_path / "channels.tsv"
    table().save(path)
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with pytest.raises(ValueError, match=f"channels.tsv.*{words}.*kvlib channels identify"):
        ChannelTable.load(path)


def test_unreadable_files(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary is no channel table"):
        ChannelTable.load(tmp_path / "binary")
    with pytest.raises(FileNotFoundError):
        ChannelTable.load(tmp_path / "missing")


def test_a_table_that_is_none_is_refused():
    order, weight = np.array([[[0, 1, 1]]]), np.ones((1, 1, 3))
    with pytest.raises(ValueError, match="layer 0, KV head 0 does not list channel 2"):
        ChannelTable(order, "", weight)
    with pytest.raises(ValueError, match=r"\(1, 3\).*\[layers, kv_heads, d\]"):
        ChannelTable(order[0], "", weight[0])
    with pytest.raises(ValueError, match=r"\(1, 1, 3\).*\(1, 1, 2\)"):
        ChannelTable(order, "", weight[..., :2])
    with pytest.raises(ValueError, match="weight is nan"):
        ChannelTable.of(weight * np.nan, "")
