"""On a GPU every recipe takes the kernels that there are for it, says so, and gives what it gives on a CPU."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import kvlib
from kvlib.group import HeadGroup
from kvlib.kernels import ops
from kvlib.kernels.ran import Noting
from kvlib.kernels.rotary import Rotary
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.testing import TinyTokenizer
from tests.as_gpu import DEVICE, as_gpu
from tests.hf.test_graph import model_of, prompt_of, read

PROMPT, STEPS = 150, 2
BLOCKS = " + recent=8 + block=8"
IDS = torch.randint(3, 256, (2, 400), generator=torch.Generator().manual_seed(4))

CHOICE, CUT = {"bounds", "rank"}, {"bounds", "rank", "cut"}
LAUNCHED = {  # by a step, besides `decode` for tail and sinks, `merge`, and `pack` where a block is due
    "full": set(),
    "streaming_llm(sink=4, recent=40)": set(),
    "h2o(budget=48)": {"column_mass"},
    "h2o(budget=48) @ host": set(),
    "snapkv(budget=48, window=8, adaptive=True)": set(),
    "quest(budget=48, page=4)": CUT,
    "quest(budget=48, page=4) @ host": {*CHOICE, "top", "gather_host"},
    "clusterkv(budget=48, cluster=6)": {*CUT, "list_units"},
    "sentencekv(budget=48, r=inf)": {*CUT, "list_units"},
    "tokenselect(budget=48)": {"rank"},
    "double_sparsity(budget=48, factor=4)": CHOICE,
    "landmarks(budget=48, chunk=4, outliers=2)": CUT,
    "kv4" + BLOCKS: {"decode_q4"},
    "kivi(bits=2, group=32) + recent=32 + block=32": {"decode_q4"},
    "kv(k='kv8', v='kv4')" + BLOCKS: {"decode_q4"},
    "rotated(bits=4)" + BLOCKS: {"decode_q4"},
    "tokenselect(budget=48) + kv4": {"rank", "unpack", "decode_q4"},  # all keys, which it scores, become vectors
    "tokenselect(budget=48) + kv4 @ host": {"rank", "unpack", "decode_q4", "gather_host"},
    "quest(budget=48, page=4) + kv4": {*CHOICE, "unpack", "top", "decode_q4"},  # of the page that is cut
    "quest(budget=64, page=4) + kivi(bits=4, group=16) + recent=16 + block=16 @ host": {
        *CHOICE,
        "unpack",
        "top",
        "gather_host",
    },
    "rotated(bits=3)" + BLOCKS: {"unpack"},
    "rotated(bits=4, levels='lloyd_max')" + BLOCKS: {"unpack"},
    "mustafar + recent=136 + block=8": {"expand"},
    "hierarchical(group=8)" + BLOCKS: {"unpack"},
    "kv(k='full', v='kv4')" + BLOCKS: {"unpack"},
    "kv4" + BLOCKS + " @ host": {"decode_q4"},
    "kivi(bits=4, group=0)" + BLOCKS + " @ host": {"decode_q4", "unpack"},  # a piece of one segment, then of two
    "h2o(budget=48) + kv4": {"column_mass", "unpack", "decode_q4"},
}
IN_HALF = {  # kernels that rebuild keys by products of half precision
    "low_rank(rank=16, chunk=4)" + BLOCKS: {"decode_lowrank"},
    "shadowkv(budget=64, rank=16)": {*CHOICE, "top", "decode_lowrank", "gather_host"},
}
FROM_PROMPTS = {
    "h2o(budget=48)": {"column_mass"},
    "snapkv(budget=48, window=8, adaptive=True)": {"column_mass"},
    "clusterkv(budget=48, cluster=6)": {"kmeans_assign", "kmeans_update"},
    "kv4" + BLOCKS: {"pack"},
}


def group_of(text, d):
    recipe = Recipe.parse(text)
    ids, rotary = IDS.to(DEVICE), Rotary(tuple(100.0 ** (-2 * i / d) for i in range(d // 2)))

    def ids_at(positions):
        return ids.to(positions.device)[torch.arange(2, device=positions.device).view(-1, 1, 1), positions.long()]

    roles = recipe.select, None, recipe.tier, recipe.codec
    return HeadGroup(recipe.evictor, recipe.sizes, ids_at, TinyTokenizer(), *roles, rotary)


def outputs(text, device, launched=None, d=32, dtype=torch.float32, spec=None, turn=4, loud=1.0):
    """Of a padded prompt in two chunks, of steps and a second turn; what each of them launched and noted."""
    generator = torch.Generator().manual_seed(1)
    borders = [0, 100, *range(PROMPT, PROMPT + STEPS + 1), PROMPT + STEPS + turn]
    q, k, v = (torch.randn(2, heads, borders[-1], d, generator=generator).to(device, dtype) for heads in (8, 2, 2))
    k[..., 0] *= loud
    q[..., 0] *= loud
    group, found, names, notes = group_of(text, d), [], [], set()
    with torch.no_grad(), Noting(notes):
        for lo, hi in pairwise(borders):
            chunk = (x[:, :, lo:hi] for x in (q, k, v))
            new = np.array([hi - lo, hi - lo - 19]) if lo == 0 else None
            out = group.forward(*chunk, new, spec or Spec(d**-0.5), False)
            found.append(out[:, :, -30:].float().cpu())
            if hi == PROMPT:
                group.finish_prefill()
            if hi in (PROMPT, PROMPT + STEPS, borders[-1]):
                names.append((set(launched or ()), set(notes)))
                notes.clear()
                if launched is not None:
                    launched.clear()
    return torch.cat(found, 2), *names


@pytest.mark.parametrize("text", LAUNCHED)
def test_steps_take_their_kernels(text, monkeypatch):
    expected, *_ = outputs(text, "cpu")
    with as_gpu(monkeypatch) as launched:
        found, prompt, step, _ = outputs(text, DEVICE, launched)
    assert step[0] - {"decode", "merge", "pack"} == LAUNCHED[text]
    assert prompt[0] >= FROM_PROMPTS.get(text, set())
    reads = {by for what, by in step[1] if what == "codes"}
    assert reads == ({"Triton"} if step[0] & {"decode_q4", "unpack", "expand"} else set())
    if not text.startswith("clusterkv"):  # whose clusters are others on a GPU: all heads take as many rounds
        torch.testing.assert_close(found, expected, atol=3e-3 if "Triton" in reads else 3e-6, rtol=0)


@pytest.mark.parametrize("text", IN_HALF)
def test_low_rank_keys(text, monkeypatch):
    expected, *_ = outputs(text, "cpu", dtype=torch.float16)
    with as_gpu(monkeypatch) as launched:
        found, _, step, _ = outputs(text, DEVICE, launched, dtype=torch.float16)
    assert step[0] - {"decode", "merge"} == IN_HALF[text]
    assert ("codes", "Triton") in step[1]
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("codec", ["kv4", "kivi(bits=4, group=32)", "rotated(bits=3)", "kv(k='full', v='kv4')"])
def test_a_long_second_turn_attends_vectors(codec, monkeypatch):
    text = codec + " + recent=32 + block=32"
    expected, *_ = outputs(text, "cpu", turn=40)
    with as_gpu(monkeypatch) as launched:
        found, _, _, turn = outputs(text, DEVICE, launched, turn=40)
    assert "unpack" in turn[0] and {by for what, by in turn[1] if what == "codes"} == {"Triton"}
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize("text", ["kv4(smooth=1.0)" + BLOCKS, "tokenselect(budget=48) + kv4(smooth=1.0)"])
def test_smoothed_queries_fit_into_halves(text, monkeypatch):
    """A channel with large keys, by which smoothing multiplies queries."""
    expected, *_ = outputs(text, "cpu", turn=40, loud=90.0)
    with as_gpu(monkeypatch) as launched:
        found, *_ = outputs(text, DEVICE, launched, turn=40, loud=90.0)
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0)  # logits in the thousands, rounded to 11 bits


@pytest.mark.parametrize(
    ("codec", "where"),
    [("gear(bits=4, group=64)", ""), ("gear(bits=2)", ""), ("gear_l(bits=4)", ""), ("gear_l(bits=4)", " @ host")],
)
def test_gear_in_one_pass(codec, where, monkeypatch):
    text = codec + " + recent=16 + block=128" + where
    expected, *_ = outputs(text, "cpu", d=64)
    with as_gpu(monkeypatch) as launched:
        found, _, step, _ = outputs(text, DEVICE, launched, d=64)
    assert "decode_gear" in step[0] and ("codes", "Triton") in step[1] and ("codes", "torch") not in step[1]
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize(
    ("text", "softcap"), [("full", None), ("full", 5.0), ("streaming_llm(sink=4, recent=40, exact=True)", None)]
)
def test_prompts_in_half_precision(text, softcap, monkeypatch):
    """Padding, softcaps and windows, which other people's kernels do not take or take only with more packages."""
    spec = Spec(0.25, softcap)
    expected, *_ = outputs(text, "cpu", spec=spec)
    with as_gpu(monkeypatch) as launched:
        found, prompt, *_ = outputs(text, DEVICE, launched, dtype=torch.bfloat16, spec=spec)
    assert "prefill_sparse" in prompt[0] and ("prompts", "Triton") in prompt[1]
    torch.testing.assert_close(found, expected, atol=5e-2, rtol=0)


def test_a_model_and_its_report(monkeypatch):
    model, ids = model_of(), prompt_of()
    plain = kvlib.Cache(model, "duo_attention(sparsity=0.5) + quest(budget=96, page=8)")
    token = read(model, plain, ids).argmax(-1, keepdim=True)
    expected = read(model, plain, token)
    assert "attention of steps by " in plain.report()
    with as_gpu(monkeypatch) as launched:
        cache = kvlib.Cache(model, plain.recipe)
        read(model, cache, ids)
        found = read(model, cache, token)
        report = cache.report()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert launched.keys() >= {"decode", "merge", "bounds", "rank"}
    assert "attention of steps by Triton;" in report and "selection by Triton" in report


def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    """Triton launches on the current device, and a model may be spread over several."""
    now, seen = [0], []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, now[0] = now[0], self.index

        def __exit__(self, *raised):
            now[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setitem(ops.LAUNCHES, "merge", lambda *_: seen.append(now[0]))
    with FakeTensorMode():
        for index in (0, 1, 0):
            ops._launch("merge", [torch.empty(1), torch.empty(1, device=f"cuda:{index}")])
    assert seen == [0, 1, 0] and now == [0]
