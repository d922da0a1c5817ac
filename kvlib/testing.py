"""The conformance suite every method passes: `check_policy(recipe)` holds a recipe to the contracts of the design.

A small random Llama is enough, because the contracts are about arithmetic and bookkeeping, not about quality.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvlib.group import HeadGroup
from kvlib.indexed import Indexed
from kvlib.policies.encoding import MERGED, PATCH, SEGMENT, Form
from kvlib.recipe import Recipe
from kvlib.store import Store

PROMPT, STEPS, PAD = 96, 24, 17
CLOSE = 1e-5  # relative, fp32
CODED = 2e-2  # where what is attended was rounded to few bits


def tiny_model(family: str = "Llama", seed: int = 0, **config: Any) -> Any:
    """A random-weight decoder of a transformers family, in eval mode and float32, a few MB large.

    Extra keywords go to its configuration.  Sliding windows are off unless asked for.
    """
    import transformers

    base: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_FAMILIES.get(family, {}),
        **config,
    }
    torch.manual_seed(seed)
    name = family.replace("Gemma3", "Gemma3Text")
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{name}Config")(**base)).eval()
    model.generation_config.eos_token_id = None  # generate exactly what is asked for
    return model


_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 24}
_FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": None},
    "Mixtral": {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Phi3": {"sliding_window": None},
    "Gemma2": {**_SLIDING, "query_pre_attn_scalar": 16},
    "Gemma3": {**_SLIDING, "query_pre_attn_scalar": 16},
    "GptOss": {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def prompts(rows: int = 2, length: int = PROMPT, pad: int = PAD, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random ids [rows, length] and their padding mask; the last row starts with `pad` padding tokens."""
    ids = torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if pad:
        ids[-1, :pad], mask[-1, :pad] = 0, 0
    return ids, mask


class TinyTokenizer:
    """Reads the 256 ids of `tiny_model`: every eighth is a full stop, every fifth of the others a comma, else letters."""

    def __len__(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        """Every id by a name of its own."""
        return {f"<{i}>": i for i in range(256)}

    def batch_decode(self, ids: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """The text of each list of ids."""
        return ["".join("." if i % 8 == 7 else "," if i % 5 == 4 else chr(97 + i % 26) for i in row) for row in ids]


def check_policy(recipe: str | Recipe, model: Any = None, tokenizer: Any = None) -> list[str]:
    """Hold a recipe to the contracts; returns the names of the checks that ran.

    recipe: give it a budget well below 96 tokens, or nothing is ever evicted and little is tested.
    model: a transformers decoder to test on; a small random Llama by default, with a tokenizer of its own.

    Raises AssertionError naming the contract that is broken, and ValueError where the recipe evicts nothing here although
    it says that it can.
    """
    import kvlib

    recipe = Recipe.parse(recipe)
    if model is not None and next(model.parameters()).dtype != torch.float32:
        raise ValueError("the contracts are checked in float32: give model.float()")
    if model is None and tokenizer is None:
        tokenizer = TinyTokenizer()
    bench = _Bench(tiny_model() if model is None else model, recipe, tokenizer)
    try:
        for check in CHECKS:
            check(bench)
    finally:
        kvlib.detach(bench.model)
    return [check.__name__ for check in CHECKS]


class _Bench:
    """A model and a recipe under test."""

    def __init__(self, model: Any, recipe: Recipe, tokenizer: Any):
        self.model, self.recipe, self.tokenizer = model, recipe, tokenizer
        self.ids, self.mask = prompts()

    def cache(self, recipe: str | Recipe | None = None) -> Any:
        import kvlib

        return kvlib.Cache(self.model, self.recipe if recipe is None else recipe, self.tokenizer)

    def generate(self, cache: Any, ids: Tensor | None = None, mask: Tensor | None = None, **more: Any) -> Tensor:
        """Greedy tokens, prompt included."""
        ids = self.ids if ids is None else ids
        mask = self.mask if mask is None and ids is self.ids else mask
        settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **more}
        out: Tensor = self.model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
        return out

    @torch.no_grad()
    def logits(self, cache: Any, pieces: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Logits of all pieces [B, tokens, vocabulary], fed one after the other."""
        seen, outs = 0, []
        for piece in pieces:
            seen += piece.shape[1]
            part = None if mask is None else mask[:, :seen]
            outs.append(self.model(piece, attention_mask=part, past_key_values=cache).logits)
        return torch.cat(outs, 1)


def _singles(ids: Tensor) -> list[Tensor]:
    return [ids[:, i : i + 1] for i in range(ids.shape[1])]


def _close(a: Tensor, b: Tensor, what: str, bound: float = CLOSE) -> None:
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert error <= bound, f"{what}: relative difference {error:.1e} > {bound:.0e}"


def full_budget_is_full_attention(bench: _Bench) -> None:
    """Contract 1: bits on the device, close from another tier and against the stock model."""
    full = bench.cache("full")
    pieces = [bench.ids, *_singles(bench.ids[:, :4])]
    mask = torch.nn.functional.pad(bench.mask, (0, 4), value=1)
    expected = bench.logits(full, pieces, mask)
    for recipe in (bench.recipe.unlimited(), _ample(bench.recipe)):
        got = bench.logits(bench.cache(recipe), pieces, mask)
        if recipe.tier is None:
            assert torch.equal(got, expected), f"contract 1: {recipe} is not `full` to the bit"
        else:  # another order of tokens, in other pieces
            _close(got[mask.bool()], expected[mask.bool()], f"contract 1: {recipe} against `full`")
    import kvlib

    kvlib.detach(bench.model)
    stock = bench.logits(_stock_cache(bench.model), pieces, mask)
    real = mask.bool()
    _close(expected[real], stock[real], "contract 1: `full` against the stock cache")


def _ample(recipe: Recipe) -> Recipe:
    """The recipe with budgets in tokens that this prompt does not reach: everything runs, nothing is evicted."""
    ample: dict[str, Any] = {"recent": None, "block": None}
    for role in ("heads", "evict", "select", "codec"):
        method = getattr(recipe, role)
        if method is not None and not (role == "codec" and recipe.select is not None):
            fields = {field.name for field in dataclasses.fields(method)}
            sizes = {
                name: 8 * PROMPT if name == "budget" else 4 * PROMPT for name in ("budget", "recent") if name in fields
            }
            ample[role] = dataclasses.replace(method, **sizes)
    if recipe.codec is not None and recipe.evict is None:  # tokens that are old enough to be encoded would not be exact
        ample["recent"] = 2 * PROMPT
    return dataclasses.replace(recipe, **ample)


def _stock_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def position_is_not_length(bench: _Bench) -> None:
    """Contract 2."""
    cache = bench.cache()
    bench.generate(cache)
    seen = PROMPT + STEPS - 1
    assert cache.get_seq_length() == seen, f"contract 2: get_seq_length() is {cache.get_seq_length()}, seen {seen}"
    for layer in cache.managed:
        for row, pad in zip(layer.store.positions(), (0, PAD), strict=True):
            for head in row:
                assert head.unique().numel() == head.numel(), "contract 2: a position is held twice"
                assert int(head.max()) == seen - pad - 1, "contract 2: the newest token is not at its position"


def rows_are_independent(bench: _Bench) -> None:
    """Contract 3: a padded row, a row beside another, and the row alone give the same."""
    together = bench.generate(bench.cache())
    for row, pad in ((0, 0), (1, PAD)):
        alone = bench.generate(bench.cache(), bench.ids[row : row + 1, pad:])
        assert torch.equal(together[row, pad:], alone[0]), f"contract 3: row {row} (padding {pad}) depends on its batch"
    other, mask = prompts(seed=2)
    mixed = torch.cat([bench.ids[:1], other[1:]])
    again = bench.generate(bench.cache(), mixed, torch.cat([bench.mask[:1], mask[1:]]))
    assert torch.equal(again[0], together[0]), "contract 3: a row changes with its neighbour"


def chunks_equal_the_whole(bench: _Bench) -> None:
    """Contract 1, where declared: a prompt in chunks gives what the whole prompt gives."""
    if bench.recipe.chunk_invariant:
        whole, chunked = bench.cache(), bench.cache()
        a = bench.generate(whole)
        b = bench.generate(chunked, prefill_chunk_size=29)
        assert torch.equal(a, b), "contract 1: declared chunk-invariant, but chunks give other tokens"
        assert torch.equal(whole.kept(), chunked.kept()), "contract 1: chunks keep other counts"
    else:
        bench.generate(bench.cache(), prefill_chunk_size=29)


def memory_is_freed_and_counted(bench: _Bench) -> None:
    """Contract 5."""
    cache = bench.cache()
    bench.generate(cache)
    counted = sum(cache.nbytes().values())
    live = _live_bytes(cache)
    assert counted == live, f"contract 5: nbytes() says {counted}, live tensors hold {live}"
    by_part, used = cache.nbytes(by="part"), cache.nbytes(by="part", used=True)
    assert sum(by_part.values()) == counted, "contract 5: the parts do not add up"
    heads, d = cache.spec.kv_heads, cache.spec.head_dim
    kept = cache.kept()
    assert kept.shape == (len(cache.layers), 2, heads), "contract 5: kept() has another shape"
    kept = kept[torch.from_numpy(cache.managed_layers)]
    formula = sum(_formula(group, 2 * d * 4) for layer in cache.managed for group in layer.store.groups)
    held = used["sink"] + used["body"] + used["tail"]
    assert held == formula, f"contract 5: used bytes {held}, the formula gives {formula}"
    for layer in cache.managed:
        for group in layer.store.groups:
            _check_slack(group)
    if bench.recipe.codec is not None and not used["body"]:
        raise ValueError(
            f"{bench.recipe} encodes nothing of a prompt of {PROMPT} tokens: check it with smaller recent and block"
        )
    if bench.recipe.lossy:
        seen = 2 * (PROMPT + STEPS - 1) - PAD
        if int(kept.sum()) >= seen * heads * len(cache.managed):
            raise ValueError(f"{bench.recipe} evicts nothing from a prompt of {PROMPT} tokens: check it with less budget")


def _formula(group: HeadGroup, dense: int) -> int:
    """Bytes of a group's tokens: `dense` each in sinks and tail, and in the body by its forms' formulas."""
    tail, body = group.tail, group.body
    assert tail is not None
    heads, size = tail.k.shape[1], tail.k.element_size()
    held = int(tail.lengths.sum()) * heads + (0 if group.sink is None else int(group.sink.counts.sum()))
    if not isinstance(body, Indexed):
        own = float(dense)
        if body is not None and body.coding is not None:
            pairs = zip(body.coding.forms, (tail.k, tail.v), strict=True)
            own = sum(form.bytes_per_token(x.shape[3], 0, size) for form, x in pairs)
        return held * dense + (0 if body is None else round(int(body.counts.sum()) * own))
    store = body.store
    total = float(sum(size for sizes in store.sizes.values() for row in sizes for size in row))
    for form, x in zip(store.forms, (tail.k, tail.v), strict=True):
        if not form.paged:
            total += _coded_bytes(form, x.shape[3], size, store) * (heads if form.scope == "head" else 1)
    exact = store.rows.get(PATCH)
    return held * dense + round(total) + (sum(exact.used(name) for name in exact.parts) if exact else 0)


def _coded_bytes(form: Form, d: int, size: int, store: Store) -> float:
    """Bytes of one head's tokens by the formula, in segments that may have been merged since."""
    plain = form.bytes_per_token(d, 0, size)
    total = float(store.counts.sum()) * plain
    for span, name in ((SEGMENT, "n"), (MERGED, "merged")):
        for length in (n for row in store.lengths.get(span, ()) for n in row):
            total += length * (form.bytes_per_token(d, itemsize=size, **{name: length}) - plain)
    return total


def _check_slack(group: Any) -> None:
    """Spare slots: at most 6 % or 64 of a tail, at most 64 per head of the sink and of the body."""
    tail = group.tail
    spare, used = tail.k.shape[2] - (tail.end - tail.begin), tail.end - tail.begin
    assert spare <= max(64, 0.06 * used), f"contract 5: a tail of {used} tokens has {spare} spare slots"
    for tiles in (group.sink, group.body):
        if isinstance(tiles, Indexed):
            for rows in (*tiles.store.rows.values(), tiles.places, tiles.units):
                most = int(rows.counts.max(initial=0))
                for name, x in rows.parts.items():
                    spare = x.shape[2] - most
                    assert spare <= max(64, 0.06 * most), f"contract 5: {most} {name} of the body have {spare} spare slots"
        elif tiles is not None:
            spare = tiles.k.shape[0] * tiles.k.shape[1] - int(tiles.counts.sum())
            assert spare <= 64 * tiles.counts.size, f"contract 5: {spare} spare slots in {tiles.counts.size} heads"


def _live_bytes(cache: Any) -> int:
    """Bytes of the distinct storages reachable from a cache's layers, found by the garbage collector."""
    gc.collect()
    found: dict[int, int] = {}
    stack: list[Any] = [cache.layers, cache.token_ids]
    visited: set[int] = set()
    while stack:
        item = stack.pop()
        if id(item) in visited or isinstance(item, type) or (callable(item) and not hasattr(item, "__dict__")):
            continue
        visited.add(id(item))
        if isinstance(item, torch.nn.Parameter):
            continue  # a model's own attention sinks are its weights
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, list | tuple | dict):
            stack += item.values() if isinstance(item, dict) else item
        elif type(item).__module__.startswith(("kvlib", "transformers.cache_utils")):
            stack += vars(item).values()
    return sum(size for address, size in found.items() if address)


def loss_is_declared(bench: _Bench) -> None:
    """Contract 6: a recipe that says it is lossless holds every token."""
    if not bench.recipe.lossy:
        cache = bench.cache()
        bench.generate(cache)
        seen = torch.tensor([PROMPT, PROMPT - PAD]) + STEPS - 1
        kept = cache.kept()[torch.from_numpy(cache.managed_layers)]
        assert torch.equal(kept, seen[None, :, None].expand_as(kept)), "contract 6: tokens are missing from a lossless one"


def bad_input_changes_nothing(bench: _Bench) -> None:
    """Contract 7: a batch that does not fit is refused and the cache goes on as if nothing had happened."""
    cache = bench.cache()
    first = bench.logits(cache, [bench.ids, bench.ids[:, :1]])
    before, kept = cache.get_seq_length(), cache.kept()
    try:
        bench.logits(cache, [bench.ids[:1, :1]])
    except ValueError as error:
        assert "reset" in str(error), "contract 7: the error does not name the remedy"
    else:
        raise AssertionError("contract 7: one row was accepted by a cache that holds two")
    assert cache.get_seq_length() == before, "contract 7: a refused batch changed the length"
    assert torch.equal(cache.kept(), kept), "contract 7: a refused batch changed what is held"
    after = bench.logits(cache, [bench.ids[:, 1:2]])
    clean = bench.logits(bench.cache(), [bench.ids, bench.ids[:, :1], bench.ids[:, 1:2]])
    assert torch.equal(torch.cat([first, after], 1), clean), "contract 7: a refused batch left a trace"


def reset_and_reuse(bench: _Bench) -> None:
    """A cache that was reset serves another batch as a fresh one does; two caches do not touch each other."""
    cache = bench.cache()
    one = bench.generate(cache)
    cache.reset()
    assert cache.get_seq_length() == 0, "reset left tokens"
    alone = bench.generate(cache, bench.ids[:1])
    assert torch.equal(alone[0], one[0]), "reset left a trace"
    a, b = bench.cache(), bench.cache("full")
    for piece in (bench.ids, bench.ids[:, :1], bench.ids[:, 1:2]):
        mixed = bench.logits(a, [piece])
        bench.logits(b, [piece])
    lone = bench.logits(bench.cache(), [bench.ids, bench.ids[:, :1], bench.ids[:, 1:2]])[:, -1:]
    assert torch.equal(mixed, lone), "two caches on one model touch each other"


def drafts_leave_no_trace(bench: _Bench) -> None:
    """Provisional tokens that are taken back never happened; accepted ones count as if they had come alone."""
    ids = bench.ids[:1]
    follow = prompts(1, 40, 0, seed=5)[0]
    plain, drafted = bench.cache(), bench.cache()
    expected = bench.logits(plain, [ids, *_singles(follow)])[:, ids.shape[1] :]
    bench.logits(drafted, [ids])
    drafted.finish_prefill()
    drafted.activate_past_recording()
    outs, at = [], 0
    for draft, rejected in ((7, 3), (1, 0), (9, 9), (12, 1), (30, 6), (5, 0)):
        good = min(draft - rejected, follow.shape[1] - at)
        wrong = torch.full((1, draft - good), 7)
        out = bench.logits(drafted, [torch.cat([follow[:, at : at + good], wrong], 1)])
        drafted.crop(-(draft - good))
        outs.append(out[:, :good])
        at += good
    got = torch.cat(outs, 1)
    coded = (
        bench.recipe.codec is not None
    )  # keys that differ in their last bits can fall on another side of a code's border
    _close(got, expected[:, :at], "verified drafts against single tokens", CODED if coded else CLOSE)
    assert at == follow.shape[1]
    bench.logits(plain, [ids[:, :1]])
    bench.logits(drafted, [ids[:, :1]])
    drafted.crop(0)
    assert torch.equal(plain.kept(), drafted.kept()), "drafts changed what is held"
    assert drafted.nbytes(by="part")["staging"] == 0, "drafts that were settled still take bytes"


CHECKS: list[Callable[[_Bench], None]] = [
    full_budget_is_full_attention,
    position_is_not_length,
    rows_are_independent,
    chunks_equal_the_whole,
    memory_is_freed_and_counted,
    loss_is_declared,
    bad_input_changes_nothing,
    reset_and_reuse,
    drafts_leave_no_trace,
]
