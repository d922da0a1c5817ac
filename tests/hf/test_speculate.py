"""Self-speculative decoding: the tokens and the cache of plain decoding, whatever was drafted and taken back."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

import kvlib
from kvlib import generate_speculative
from kvlib.hf import speculate
from kvlib.hf.prompt import own_positions
from kvlib.indexed import Indexed
from kvlib.policies import RecipeError
from kvlib.recipe import Recipe
from kvlib.testing import TinyTokenizer, prompts, tiny_model

NEW, PROMPT, PAD = 12, 96, 17
SIZES = " + sink=4 + recent=16 + block=8"
PLANES = "hierarchical(group=8, recent=16)"
PAIRS = [  # exact, draft
    ("full", "quest(budget=32, page=4)"),
    ("full", "tokenselect(budget=32)"),
    ("full @ host", "clusterkv(budget=32, cluster=6)"),
    ("full @ host(attend=True)", "quest(budget=32, page=4)"),
    (PLANES + " + block=8", "hierarchical(group=8, recent=16, planes=1)"),
    (PLANES + " + block=8 @ host", "hierarchical(group=8, recent=16, planes=1)"),
    ("hierarchical(group=8)" + SIZES, "quest(budget=48, page=8) + hierarchical(group=8, planes=1)"),
    ("kv4" + SIZES, "oracle(budget=48)"),
    ("snapkv(budget=48, window=8)", "clusterkv(budget=24, cluster=4)"),
    ("kivi(bits=4, group=8, recent=16) + block=16", "quest(budget=48, page=4)"),
    ("duo_attention(sparsity=0.5, sink=4, recent=16)", "quest(budget=32, page=4)"),
    ("low_rank(rank=24, chunk=4)" + SIZES + " @ host", "landmarks(budget=48, chunk=4)"),
]
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}, {pair[1]}")


@lru_cache
def model_of(seed=0):
    return tiny_model(seed=seed, num_hidden_layers=2)


def prompt_of():
    return prompts(2, PROMPT, PAD)


def own_tokens(model, recipe, inputs, new=NEW):
    """Plain decoding: prompt and greedy tokens, one by one, and the cache."""
    ids, mask = inputs
    cache = kvlib.Cache(model, recipe, TinyTokenizer())
    with torch.no_grad():
        for i in range(new):
            feed = ids if not i else ids[:, -1:]
            at = own_positions(mask, feed.shape[1])
            chosen = model(feed, attention_mask=mask, past_key_values=cache, position_ids=at).logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, chosen], 1), pad(mask, (0, 1), value=1)
    return ids, cache


@lru_cache
def plain(recipe, new=NEW):
    return own_tokens(model_of(), recipe, prompt_of(), new)


def speculated(pair, gamma, new=NEW, model=None, inputs=None):
    ids, mask = prompt_of() if inputs is None else inputs
    given = ids if mask is None else {"input_ids": ids, "attention_mask": mask}
    exact, draft = pair
    return generate_speculative(model or model_of(), given, draft, gamma, exact, new, TinyTokenizer())


def coded(body):
    return isinstance(body, Indexed) and not all(form.exact for form in body.store.forms)


def vectors(group, row, head):
    """Positions, keys and values of what a group holds, in order of positions; of a coded body none."""
    found = []
    for tiles in (group.sink, group.body):
        if isinstance(tiles, Indexed):
            n = 0 if coded(tiles) else int(tiles.counts[row])
            kept = (tiles.store.own[name][row, head, :n] for name in ("k.x", "v.x")) if n else ()
            found += [(tiles.positions(row, head)[:n], *kept)] if n else []
        elif tiles is not None:
            slots = tiles.slots()[row, head]
            found.append([x.flatten(0, 1)[slots[slots >= 0]] for x in (tiles.positions, tiles.k, tiles.v)])
    tail, last = group.tail, int(group.tokens[row])
    live = slice(int(tail.starts[row]), tail.end)
    found.append([torch.arange(last - int(tail.lengths[row]), last), tail.k[row, head, live], tail.v[row, head, live]])
    at, k, v = (torch.cat([part[i] for part in found]) for i in range(3))
    order = at.argsort()
    return at[order], k[order], v[order]


def assert_same_state(cache, other):
    """What is held, to how forwards of several tokens round; of codes nearly all to the bit."""
    assert torch.equal(cache.kept(), other.kept())
    for mine, its in zip(cache.managed, other.managed, strict=True):
        for row, same in zip(mine.store.positions(), its.store.positions(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(row, same, strict=True))
        for a, b in zip(mine.store.groups, its.store.groups, strict=True):
            assert coded(a.body) == coded(b.body)
            for row in range(len(a.tokens)):
                for head in range(a.tail.k.shape[1]):
                    (at, *x), (there, *y) = vectors(a, row, head), vectors(b, row, head)
                    assert torch.equal(at, there)
                    for one, two in zip(x, y, strict=True):
                        torch.testing.assert_close(one, two, atol=2e-3, rtol=2e-3)
            if coded(a.body):
                assert_same_store(a.body.store, b.body.store)


def assert_same_store(a, b):
    assert a.counts.tolist() == b.counts.tolist()
    assert a.lengths == b.lengths
    assert a.used() == b.used()
    for span, rows in a.rows.items():
        for name in rows.parts:
            for r, n in enumerate(rows.counts.tolist()):
                x, y = (each.rows[span].parts[name][r, :, :n].float() for each in (a, b))
                assert ((x - y).abs() > 2e-3 * (1 + y.abs())).float().mean() < 0.01


# --------------------------------------------------------------------------------------------------------- the tokens
@pairs
@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_the_tokens_are_those_of_plain_decoding(pair, gamma):
    """A block of eight tokens is sealed every few rounds; one row is padded."""
    expected, cache = plain(pair[0])
    found = speculated(pair, gamma)
    assert torch.equal(found.sequences, expected)
    assert found.cache.nbytes(by="part")["staging"] == 0
    assert found.cache.get_seq_length() == cache.get_seq_length() == PROMPT + NEW - 1
    assert torch.equal(found.cache.kept(), cache.kept())
    assert 1 + found.accepted + found.rounds == NEW
    assert 0 <= found.acceptance == found.accepted / found.drafted <= 1
    assert found.rounds <= found.drafted + 1 <= gamma * found.rounds + 1


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[4]], ids=str)
@pytest.mark.parametrize("new", [1, 2, 3, 5, 6, 9])
def test_it_stops_in_the_middle_of_a_round(pair, new):
    found = speculated(pair, 4, new)
    assert torch.equal(found.sequences, plain(pair[0])[0][:, : PROMPT + new])
    assert found.cache.get_seq_length() == PROMPT + new - 1
    assert found.cache.nbytes(by="part")["staging"] == 0
    assert (found.rounds == 0) == (new == 1) == (found.cache.kept()[0, 0, 0] == PROMPT)


def test_ids_alone_will_do_and_a_mask_of_ones_is_none():
    ids, model = prompts(2, PROMPT, 0)[0], model_of()
    outs = [
        generate_speculative(model, given, PAIRS[0][1], max_new_tokens=6).sequences for given in (ids, {"input_ids": ids})
    ]
    outs.append(speculated(PAIRS[0], 4, 6, inputs=(ids, torch.ones_like(ids))).sequences)
    expected, _ = own_tokens(model, "full", (ids, torch.ones_like(ids)), 6)
    assert all(torch.equal(out, expected) for out in outs)


@pairs
@torch.no_grad()
def test_drafts_are_what_the_draft_recipe_would_say(pair, monkeypatch):
    """The first round's are those of a cache that reads so always."""
    made, true = [], speculate._Run._draft
    monkeypatch.setattr(speculate._Run, "_draft", lambda run, last, n: made.append(true(run, last, n)) or made[-1])
    found = speculated(pair, 5, 8)
    assert found.drafted == sum(drafts.shape[1] for drafts in made)
    model, run = model_of(), started(pair, steps=0)
    if Recipe.parse(pair[1]).select is None:  # one plane of both, or of the one that is kept
        exact = Recipe.parse(pair[0])
        tokens, _ = own_tokens(model, replace(exact, codec=exact.codec.draft()), prompt_of(), 6)
        assert torch.equal(made[0], tokens[:, PROMPT + 1 :])
    else:
        run.cache.read_as_draft(True, run.cheap)
        last, drafts = run.first, []
        for _ in range(5):
            last = run._step(last, keep=1)
            drafts.append(last)
        assert torch.equal(made[0], torch.cat(drafts, 1))


def started(pair, steps):
    """A run that has read its prompt and some more tokens, read exactly."""
    exact, draft = (Recipe.parse(text) for text in pair)
    held = []

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(run, last, n):
        held.append((run, last))
        if len(held) > steps:
            raise Stopped
        return (last + torch.arange(1, n + 1)) % 256

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculate._Run, "_draft", stop)
        with pytest.raises(Stopped):
            speculated((exact, draft), 5, 8 + steps)
    run, run.first = held[-1]
    return run


@pairs
@torch.no_grad()
def test_drafts_read_less_than_what_verifies_them(pair):
    """Fewer tokens or fewer bytes of them: a query sees something else."""
    run = started(pair, steps=0)
    outs, before = [], run.cache.traffic().moved
    moved = []
    for draft in (True, False):
        run.cache.read_as_draft(draft, run.cheap)
        given = {
            "attention_mask": pad(run.mask, (0, 1), value=1),
            "position_ids": own_positions(pad(run.mask, (0, 1), value=1), 1),
        }
        outs.append(run.model(run.first, past_key_values=run.cache, **given).logits)
        run.cache.crop(-1)
        run.cache.activate_past_recording()
        moved.append(run.cache.traffic().moved - before)
        before += moved[-1]
    assert not torch.allclose(*outs, atol=1e-4)
    if pair[0].endswith("@ host"):
        assert moved[0] < moved[1]
        if run.cheap and Recipe.parse(pair[1]).select is None:
            assert moved[0] == 0


def test_a_small_budget_drafts_badly_and_a_large_one_well():
    """What is verified does not depend on it; how often it is right does."""
    found = [speculated(("full", f"oracle(budget={budget})"), 3).acceptance for budget in (8, 100)]
    assert found[0] < 0.5 < found[1]
    assert speculated(PAIRS[4], 3).acceptance > 0.5


# --------------------------------------------------------------------------------------------------- ends of a sequence
def expected_with_end(tokens, ends, fill):
    """Each row up to its first end, padded from there."""
    out = tokens.clone()
    for row in out:
        at = torch.isin(row[PROMPT:], torch.tensor(ends)).nonzero().flatten()
        if len(at):
            row[PROMPT + int(at[0]) + 1 :] = fill
    return out


@pytest.fixture
def ending():
    """A model whose end of sequence can be set."""
    model = tiny_model(num_hidden_layers=2)

    def make(ends, fill=0):
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = ends, fill
        return model

    return make


def first_at(row, place):
    """A token of a row that is not among those before it, at `place` or later."""
    for at in range(place, len(row)):
        if row[at] not in row[:at]:
            return at, int(row[at])
    raise AssertionError("no token stands out")


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[4]], ids=str)
@pytest.mark.parametrize("gamma", [2, 5])
@pytest.mark.parametrize("row", [0, 1])
def test_a_row_that_has_ended_is_padded_and_the_other_goes_on(pair, gamma, row, ending):
    tokens = plain(pair[0])[0]
    for place in (1, 4):
        _, end = first_at(tokens[row, PROMPT:].tolist(), place)
        found = speculated(pair, gamma, model=ending(end, 9)).sequences
        wanted = expected_with_end(tokens, [end], 9)
        assert torch.equal(found, wanted[:, : found.shape[1]])
        assert (wanted[:, found.shape[1] :] == 9).all()


def test_there_may_be_several_ends_and_no_padding_token(ending):
    tokens = plain("full")[0]
    ends = [first_at(tokens[row, PROMPT:].tolist(), 3 + row)[1] for row in (0, 1)]
    found = speculated(PAIRS[0], 3, model=ending(ends, None)).sequences
    wanted = expected_with_end(tokens, ends, ends[0])
    assert torch.equal(found, wanted[:, : found.shape[1]])
    assert found.shape[1] < PROMPT + NEW
    assert torch.isin(found[:, PROMPT:], torch.tensor(ends)).any(1).all()


def test_a_prompt_whose_first_token_is_the_end(ending):
    tokens = plain("full")[0]
    ends = tokens[:, PROMPT].tolist()
    found = speculated(PAIRS[0], 3, model=ending(ends))
    assert torch.equal(found.sequences, tokens[:, : PROMPT + 1])
    assert (found.drafted, found.accepted, found.rounds) == (0, 0, 0)


@pytest.mark.parametrize("place", [2, 3, 4])
def test_a_lone_row_and_its_cache_end_where_plain_decoding_does(place, ending, monkeypatch):
    """Another turn would otherwise follow on tokens that nobody was shown."""
    ids, mask = prompts(1, PROMPT, 0)
    tokens, _ = own_tokens(model_of(), "full", (ids, mask))
    at, end = first_at(tokens[0, PROMPT:].tolist(), place)
    scripted(monkeypatch, tokens, [7] * NEW)
    found = speculated(PAIRS[0], 7, model=ending(end), inputs=(ids, mask))
    assert found.sequences.shape[1] == PROMPT + at + 1
    assert found.cache.get_seq_length() == PROMPT + at


# ------------------------------------------------------------------------------------------------------- another turn
@pairs
@torch.no_grad()
def test_another_turn_finds_the_cache_of_plain_decoding(pair):
    ids, cache = own_tokens(model_of(), pair[0], prompt_of())
    found, model = speculated(pair, 4), model_of()
    assert_same_state(found.cache, cache)
    follow, mask = prompts(2, 40, 0, seed=8)[0], pad(prompt_of()[1], (0, NEW), value=1)
    for new in (torch.cat([ids[:, -1:], follow[:, :30]], 1), *(follow[:, t : t + 1] for t in range(30, 40))):
        mask = pad(mask, (0, new.shape[1]), value=1) if new.shape[1] == 1 else pad(mask, (0, new.shape[1] - 1), value=1)
        outs = []
        for each in (found.cache, cache):
            given = {"attention_mask": mask, "position_ids": own_positions(mask, new.shape[1]), "logits_to_keep": 1}
            outs.append(model(new, past_key_values=each, **given).logits)
        assert (outs[0] - outs[1]).abs().max() <= 5e-3 * outs[1].abs().max()
    assert torch.equal(found.cache.kept(), cache.kept())
    assert found.cache.nbytes(by="part")["staging"] == 0


def test_generate_goes_on_from_the_cache_it_returns():
    ids, model = prompts(1, PROMPT, 0)[0], model_of()
    first = generate_speculative(model, ids, PAIRS[0][1], 3, max_new_tokens=NEW)
    own, cache = own_tokens(model, "full", (ids, torch.ones_like(ids)))
    turn = torch.cat([first.sequences, prompts(1, 12, 0, seed=4)[0]], 1)
    length = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(turn, past_key_values=cache, **length)
    assert torch.equal(model.generate(turn, past_key_values=first.cache, **length), expected)
    assert torch.equal(own, turn[:, : PROMPT + NEW])


# ------------------------------------------------------------------------------------------------ scripted acceptance
def scripted(monkeypatch, tokens, rights, wrong_rows=None):
    """Let round i draft rights[i] right tokens and then wrong ones; in `wrong_rows` only."""
    script = iter(rights)

    def draft(run, last, n):
        at, right = run.cache.get_seq_length() + 1, next(script)
        assert torch.equal(last, tokens[:, at - 1 : at]) or wrong_rows is not None
        out = tokens[:, at : at + n].clone()
        rows = slice(None) if wrong_rows is None else wrong_rows
        out[rows, right:] = (out[rows, right:] + 1) % 256
        return out

    monkeypatch.setattr(speculate._Run, "_draft", draft)


SCRIPTED = [PAIRS[i] for i in (0, 2, 4, 5, 8, 9, 10, 11)]


@given(st.sampled_from(SCRIPTED), st.integers(1, 9), st.lists(st.integers(0, 9), min_size=NEW, max_size=NEW))
@settings(max_examples=25)
def test_after_any_script_the_cache_is_that_of_plain_decoding(pair, gamma, rights):
    expected, cache = plain(pair[0])
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, expected, rights)
        found = speculated(pair, gamma)
    assert torch.equal(found.sequences, expected)
    assert_same_state(found.cache, cache)
    left, drafted, accepted, rounds = NEW - 1, 0, 0, 0
    while left:
        room = min(gamma, left - 1)
        agreed = min(room, rights[rounds]) if room else 0
        left -= agreed + 1
        drafted, accepted = drafted + room, accepted + agreed
        rounds += bool(room)
        if not room:
            break
    assert (found.drafted, found.accepted) == (drafted, accepted)
    assert found.rounds == NEW - 1 - accepted
    assert found.cache.nbytes(by="part")["staging"] == 0


def test_drafts_longer_than_a_block_of_a_body_are_settled_or_taken_back(monkeypatch):
    pair, new = PAIRS[4], 80
    expected, cache = plain(pair[0], new)
    scripted(monkeypatch, expected, [30, 0, 17, 40, 5] + [40] * new)
    found = speculated(pair, 40, new)
    assert torch.equal(found.sequences, expected)
    assert found.accepted > 60
    assert_same_state(found.cache, cache)


def test_a_batch_goes_on_with_what_its_worst_row_accepts(monkeypatch):
    expected, _ = plain("full")
    scripted(monkeypatch, expected, [1] * NEW, wrong_rows=slice(1, 2))
    found = speculated(PAIRS[0], 4)
    assert torch.equal(found.sequences, expected)
    assert found.rounds == (NEW - 1 + 1) // 2
    assert found.accepted == NEW - 1 - found.rounds


def test_a_row_that_has_ended_holds_nobody_back(monkeypatch, ending):
    expected, _ = plain("full")
    end = int(expected[0, PROMPT])
    assert end not in expected[1]
    wanted = expected_with_end(expected, [end], 0)
    scripted(monkeypatch, expected, [0] * NEW, wrong_rows=slice(0, 1))
    found = speculated(PAIRS[0], 4, model=ending(end))
    assert torch.equal(found.sequences, wanted)
    assert found.accepted == found.drafted > 0


def test_acceptance_of_nothing_is_none():
    found = speculated(PAIRS[0], 3, 1)
    assert (found.drafted, found.accepted, found.rounds, found.acceptance) == (0, 0, 0, 0.0)


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("exact", "draft", "words"),
    [
        ("quest(budget=64)", "quest(budget=48)", "quest: .*give the selector to draft_recipe only"),
        ("shadowkv(budget=64, rank=8)", "landmarks(budget=48)", "landmarks: .*draft_recipe only"),
        ("full", "quest(budget=48) @ host", "draft_recipe.*tier.*leave it out"),
        ("full @ host", "quest(budget=48) @ host(attend=True)", "draft_recipe.*tier.*leave it out"),
        ("full", "duo_attention + quest(budget=48)", "draft_recipe.*heads.*leave it out"),
        ("full", "h2o_prefill(budget=48) + clusterkv(budget=24)", "draft_recipe.*evict.*leave it out"),
        ("snapkv(budget=64)", "h2o_prefill(budget=48) + clusterkv(budget=24)", "draft_recipe.*evict.*leave it out"),
        ("full", "full", "reads as much as the exact recipe"),
        ("hierarchical", "full", "reads as much as the exact recipe"),
        ("hierarchical", "hierarchical", "reads as much as the exact recipe"),
        ("hierarchical(planes=1)", "hierarchical(planes=1)", "reads as much as the exact recipe"),
        ("snapkv(budget=64)", "snapkv(budget=64)", "reads as much as the exact recipe"),
        ("full", "kv4", "draft_recipe.*codec.*leave it out"),
        ("full", "hierarchical(planes=1)", "draft_recipe.*codec"),
        ("hierarchical", "hierarchical(planes=1, group=64)", "draft_recipe.*codec"),
        ("kv4", "quest(budget=48) + kv8", "draft_recipe.*codec"),
        ("lossless @ host", "quest(budget=256)", "lossless.*64 tokens at a time"),
        ("h2o(budget=64)", "clusterkv(budget=48)", "clusterkv.*when the prompt ends"),
        ("snapkv(budget=64)", "quest(budget=48)", "quest.*neighbouring tokens"),
    ],
)
def test_recipes_that_cannot_share_a_cache_are_refused(exact, draft, words):
    with pytest.raises(RecipeError, match=words):
        generate_speculative(model_of(), prompt_of()[0], draft, recipe=exact, tokenizer=TinyTokenizer())


@pytest.mark.parametrize("wrong", [{"gamma": 0}, {"gamma": -1}, {"gamma": 2.0}, {"gamma": True}, {"max_new_tokens": 0}])
def test_sizes_are_whole_and_positive(wrong):
    with pytest.raises(RecipeError, match=f"generate_speculative.*{next(iter(wrong))}"):
        generate_speculative(model_of(), prompt_of()[0], PAIRS[0][1], **wrong)


@pytest.mark.parametrize("ids", [torch.arange(5), torch.zeros(1, 0, dtype=torch.long), torch.ones(1, 2, 3).long()])
def test_ids_have_rows_and_at_least_one_token(ids):
    for inputs in (ids, {"input_ids": ids}):
        with pytest.raises(ValueError, match="give ids \\[B, n\\]"):
            generate_speculative(model_of(), inputs, PAIRS[0][1])


def test_no_more_is_drafted_than_can_be_taken_back(ending):
    with pytest.raises(RecipeError, match=r"gamma=128.*at most 127"):
        speculated(PAIRS[0], 128, 6)
    expected, _ = plain("full")
    ends = expected[:, PROMPT + 1].tolist()
    assert not torch.isin(expected[:, PROMPT], torch.tensor(ends)).any()
    found = speculated(PAIRS[0], 127, 135, model=ending(ends))
    assert (found.drafted, found.rounds) == (127, 1)
    assert torch.equal(found.sequences, expected[:, : PROMPT + 2])


def test_a_selector_that_reads_everything_saves_nothing():
    with pytest.raises(RecipeError, match="reads as much as the exact recipe"):
        speculated(("full", "quest(budget=1.0)"), 3, 6)


def test_sizes_of_the_draft_leave_the_exact_recipe_alone():
    with pytest.raises(RecipeError, match="leave sink, recent and block out"):
        speculated(("snapkv(budget=48, window=8)", "clusterkv(budget=40, cluster=4) + sink=0 + recent=4"), 3, 6)


def test_a_selector_leaves_the_codecs_dense_tokens_dense():
    exact = "kv4(recent=64)"
    found = speculated((exact, "quest(budget=160, page=4)"), 3, 6)
    lengths = [cache.managed[0].store.groups[0].tail.lengths.tolist() for cache in (found.cache, plain(exact, 6)[1])]
    assert lengths[0] == lengths[1]


def test_the_cache_says_that_it_reads_everything():
    cache = speculated(PAIRS[0], 3, 6).cache
    assert torch.equal(cache.attended(), cache.kept())
