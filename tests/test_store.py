"""The store of a body's keys and values in the forms of every codec: what is read is what was put there, whoever else came,
was merged, was taken back or moved meanwhile."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.kernels.rotary import Rotary
from kvlib.kernels.take import take
from kvlib.policies.encoding import MERGED, PATCH, SEGMENT, Dense, Form
from kvlib.policies.notation import method_of
from kvlib.segment import slack
from kvlib.store import ALIKE, LONGEST, Store

BATCH, HEADS, GROUP, D = 3, 2, 2, 16
ROTARY = Rotary((1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003))
BASE = torch.tensor([4, 0, 9])  # position of the first slot of each row
SMALL = {  # with groups, pages and ranks that a few tokens fill
    "full": [],
    "gear": ["gear(bits=4, s=0.1)", "gear(bits=2, group=8, s=0.25, rank=2)"],
    "gear_l": ["gear_l(bits=2, group=8, rank=3)", "gear_l"],
    "hierarchical": ["hierarchical(group=8)", "hierarchical(group=8, planes=1)"],
    "kivi": ["kivi(group=8)", "kivi(bits=4, group=0)"],
    "kv": ['kv(k="kivi(group=8)", v="gear_l")', 'kv(k="full", v="kv8")', 'kv(k="lossless(page=8)", v="kivi(group=4)")'],
    "kv4": ["kv4", "kv4(smooth=0.5)"],
    "lossless": ["lossless(page=8)"],
    "low_rank": ["low_rank(rank=24, chunk=4)", "low_rank(rank=32, chunk=1, outliers=2)"],
    "rotated": ["rotated", "rotated(bits=3, levels='lloyd_max')"],
}
NAMES = [row["name"] for row in kvlib.methods() if row["role"] == "codec"]
CODECS = [text for name in NAMES for text in SMALL.get(name, [name])]
PICKED = [text for text in CODECS if all(form.read_granularity == 1 for form in method_of(text).forms())]
codecs = pytest.mark.parametrize("codec", CODECS)
picked = pytest.mark.parametrize("codec", PICKED)


def cloud(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def empty_store(codec, batch=BATCH, heads=HEADS, **more):
    return Store(method_of(codec).forms(), batch, heads, torch.device("cpu"), rotary=ROTARY, **more)


def tokens(m, seed, batch=BATCH, heads=HEADS, dtype=torch.float32):
    """Keys with a channel that stands out, and values."""
    k, v = cloud(seed, batch, heads, m, D), cloud(seed + 1, batch, heads, m, D)
    k[..., 3] += 5
    return k.to(dtype), v.to(dtype)


def put(store, rows, k, v):
    """Append a block to some rows."""
    rows = np.asarray(rows)
    first = BASE[rows] + torch.from_numpy(store.counts[rows])
    position = (first.view(-1, 1, 1) + torch.arange(k.shape[2])).expand(-1, k.shape[1], -1)
    store.append(rows, k, v, position)


def at(base=BASE):
    """Positions of slots."""
    return lambda slots: slots + base.view(-1, 1, 1)


def filled(codec, plan, seed=0, **more):
    """A store to which blocks were appended: plan [(rows, grains)]."""
    store = empty_store(codec, **more)
    for i, (rows, grains) in enumerate(plan):
        put(store, rows, *(x[list(rows)] for x in tokens(grains * store.grain, seed + 2 * i)))
    return store


def read(store, side, stored):
    """The tokens [B, H', m, d] as queries meet the keys, and as the model gets the values."""
    form = store.forms["kv".index(side)]
    batch, m = len(store.counts), stored.slots.shape[-1]
    eye = torch.eye(D if side == "k" else m).expand(batch, stored.heads, -1, -1)
    if side == "k":
        return form.scores(form.prologue(eye, stored), stored).mT
    return form.epilogue(form.weighted_sum(eye, stored), stored)


def everything(store, base=BASE):
    """All tokens of all rows, by side; None past a row's end."""
    stop = int(store.counts.max())
    found = {}
    for side in "kv":
        x = read(store, side, store.piece(side, 0, stop, at(base)))
        found[side] = [x[r, :, :n] for r, n in enumerate(store.counts.tolist())]
    return found


def assert_same(a, b, atol=0.0):
    for side in "kv":
        for x, y in zip(a[side], b[side], strict=True):
            torch.testing.assert_close(x, y, atol=atol, rtol=0)


RAGGED = [((0, 1, 2), 2), ((1,), 1), ((0, 2), 3), ((2,), 8), ((0, 1), 1)]


# ------------------------------------------------------------------------------------------------------------- reading
def test_every_codec_is_tried():
    assert {"gear", "hierarchical", "kivi", "kv", "lossless", "low_rank", "mustafar", "rotated"} <= set(NAMES)
    assert set(SMALL) - {"full"} <= set(NAMES)
    spans = {span for codec in CODECS for form in method_of(codec).forms() for span in form.spans.values()}
    assert {SEGMENT, MERGED, PATCH, 1, 8} <= spans


@codecs
def test_what_is_read_is_near_what_was_stored(codec):
    """Not only the same by every way of reading: also the tokens themselves, each row's at its own slots."""
    store, given = empty_store(codec), [([], []) for _ in range(BATCH)]
    for i, (rows, grains) in enumerate(RAGGED):
        k, v = (x[list(rows)] for x in tokens(grains * store.grain, 2 * i))
        put(store, rows, k, v)
        for r, own_k, own_v in zip(rows, k, v, strict=True):
            given[r][0].append(own_k)
            given[r][1].append(own_v)
    found = everything(store)
    for side, at_side in (("k", 0), ("v", 1)):
        form = store.forms[at_side]
        for r in range(BATCH):
            wanted, got = torch.cat(given[r][at_side], 1), found[side][r]
            assert got.shape == wanted.shape
            if form.exact:
                assert torch.equal(got, wanted)
            cosine = torch.cosine_similarity(got, wanted, dim=-1)
            assert cosine.mean() > 0.8
            shuffled = torch.cosine_similarity(got, wanted.roll(1, 1), dim=-1)
            assert (cosine > shuffled).float().mean() > 0.9


@picked
@pytest.mark.parametrize("lists", [1, HEADS, HEADS * GROUP])
def test_tokens_picked_one_by_one_are_those_of_the_whole(codec, lists):
    store = filled(codec, RAGGED)
    whole = everything(store)
    m = 37
    ids = torch.stack([cloud(r, lists, m).mul(1e4).long() % int(n) for r, n in enumerate(store.counts)])
    for side in "kv":
        stored = store.take(side, ids, at())
        assert stored.heads == max(lists, HEADS)
        got = read(store, side, stored)
        for r in range(BATCH):
            for h in range(stored.heads):
                wanted = whole[side][r][h * HEADS // stored.heads][ids[r, h % lists]]
                torch.testing.assert_close(got[r, h], wanted, atol=1e-5, rtol=1e-5)


@codecs
def test_a_piece_is_that_part_of_the_whole(codec):
    store = filled(codec, RAGGED)
    whole, g = everything(store), store.grain
    for lo, hi in ((0, g), (g, 4 * g), (2 * g, 5 * g), (5 * g, 13 * g)):
        for side in "kv":
            got = read(store, side, store.piece(side, lo, hi, at()))
            for r, n in enumerate(store.counts.tolist()):
                wanted = whole[side][r][:, lo:hi]
                torch.testing.assert_close(got[r, :, : max(0, min(n, hi) - lo)], wanted, atol=1e-5, rtol=1e-5)
            assert got.isfinite().all()  # past a row's end too: it is read under a weight of zero


@pytest.mark.parametrize("codec", ["kivi(bits=4, group=0)", "gear_l"])
def test_every_piece_of_rows_whose_segments_end_elsewhere(codec):
    store = filled(codec, [((0,), 2), ((0,), 8), ((1,), 5), ((1,), 5), ((2,), 3), ((2,), 7)])
    whole = everything(store)
    for lo in range(10):
        for hi in range(lo + 1, 11):
            got = read(store, "k", store.piece("k", lo, hi, at()))
            for r in range(BATCH):
                torch.testing.assert_close(got[r], whole["k"][r][:, lo:hi], atol=1e-5, rtol=1e-5)


@picked
def test_scores_and_sums_are_those_of_the_decoded_tokens(codec):
    store = filled(codec, RAGGED)
    q, stop = cloud(5, BATCH, HEADS * GROUP, 2, D), int(store.counts.max())
    for form, side in zip(store.forms, "kv", strict=True):
        stored = store.piece(side, 0, stop, at())
        x = form.decode(stored).float().repeat_interleave(GROUP, 1)
        if side == "k":
            turned = form.prologue(q, stored)
            torch.testing.assert_close(form.scores(turned, stored), turned @ x.mT, atol=1e-4, rtol=1e-4)
            narrow = form.prologue(q[:, :, :1], stored)
            torch.testing.assert_close(narrow, turned[:, :, :1])
        else:
            p = cloud(6, BATCH, HEADS * GROUP, 2, stop).softmax(-1)
            torch.testing.assert_close(form.weighted_sum(p, stored), p @ x, atol=1e-4, rtol=1e-4)


@given(st.data())
@settings(max_examples=60)
def test_a_row_does_not_know_its_batch(data):
    codec = data.draw(st.sampled_from(CODECS))
    plan = data.draw(
        st.lists(st.tuples(st.sets(st.integers(0, 2), min_size=1), st.integers(1, 3)), min_size=1, max_size=12)
    )
    plan = [(tuple(sorted(rows)), grains) for rows, grains in plan]
    store = empty_store(codec)
    alone = [empty_store(codec, 1) for _ in range(BATCH)]
    for i, (rows, grains) in enumerate(plan):
        k, v = tokens(grains * store.grain, 2 * i)
        fresh = [r for r in rows if not store.counts[r]]
        for part in (fresh, [r for r in rows if r not in fresh]):  # rows that begin and rows that go on come apart
            if part:
                put(store, part, k[part], v[part])
        for r in rows:
            first = int(BASE[r]) + int(alone[r].counts[0])
            position = torch.arange(first, first + k.shape[2]).expand(1, HEADS, -1)
            alone[r].append(np.array([0]), k[r : r + 1], v[r : r + 1], position)
    together = everything(store)
    for r in range(BATCH):
        assert store.counts[r] == alone[r].counts[0]
        if alone[r].counts[0]:
            lone = everything(alone[r], BASE[r : r + 1])
            assert_same({side: together[side][r : r + 1] for side in "kv"}, lone, atol=2e-4)
            assert {span: lengths[r] for span, lengths in store.lengths.items()} == {
                span: lengths[0] for span, lengths in alone[r].lengths.items()
            }


# ------------------------------------------------------------------------------------- snapshots, copies, rows that move
def grown(codec, rounds=2 * ALIKE + 1):
    """A store through whose growth snapshots were taken, each with what it held then: segments merge and exact chunks
    come on the way."""
    store, kept = empty_store(codec), []
    for i in range(rounds):
        if i:
            fixed = {name: x.clone() for name, x in store.fixed.items()}
            held = everything(store), store.used(), store.counts.copy(), ends_of(store), fixed
            kept.append((store.snapshot(), *held))
        rows = (0, 1) if i % 3 else (0, 1, 2)  # one row's segments come later
        rows = (0, 1) if i == 0 else (2,) if i == 1 else rows
        put(store, rows, *(x[list(rows)] for x in tokens(-(-32 // store.grain) * store.grain, 2 * i)))
    return store, kept


def ends_of(store):
    return {span: x.tolist() for span, x in store.ends.items()}


@codecs
def test_a_snapshot_does_not_see_what_comes_later(codec):
    store, kept = grown(codec)
    assert store.counts.max() > 32 * ALIKE
    for snapshot, held, used, counts, ends, fixed in kept:
        assert all(torch.equal(x, fixed[name]) for name, x in snapshot.fixed.items())
        assert snapshot.counts.tolist() == counts.tolist()
        assert snapshot.used() == used
        assert ends_of(snapshot) == ends
        assert_same(everything(snapshot), held)


@codecs
def test_going_back_to_a_snapshot_and_on_gives_what_a_straight_way_gives(codec):
    """What is taken back was written into buffers that the snapshot shares."""
    store = filled(codec, [((0, 1, 2), 2)] * (ALIKE - 1))
    before = store.snapshot()
    for i in range(3):
        put(store, (0, 1, 2), *tokens(2 * store.grain, 500 + i))
    straight = filled(codec, [((0, 1, 2), 2)] * (ALIKE - 1))
    for i in range(3):
        for each in (before, straight):
            put(each, (0, 1, 2), *tokens(2 * store.grain, 700 + i))
    assert_same(everything(before), everything(straight))
    assert before.used() == straight.used()


@codecs
def test_rows_are_selected_with_repetition_and_then_go_their_own_way(codec):
    store = filled(codec, RAGGED)
    held, counts = everything(store), store.counts.copy()
    chosen = [2, 0, 0, 1]
    store.reorder(torch.tensor(chosen))
    base = BASE[chosen]
    assert store.counts.tolist() == counts[chosen].tolist()
    wanted = {side: [held[side][r] for r in chosen] for side in "kv"}
    assert_same(everything(store, base), wanted)
    k, v = tokens(store.grain, 900, batch=1)
    position = (base[2] + int(store.counts[2]) + torch.arange(store.grain)).expand(1, HEADS, -1)
    store.append(np.array([2]), k, v, position)
    after = everything(store, base)
    for side in "kv":
        for r in (0, 1, 3):
            assert torch.equal(after[side][r], wanted[side][r])
        assert torch.equal(after[side][2][:, : -store.grain], wanted[side][2])


@codecs
def test_a_copy_is_independent(codec):
    store = filled(codec, RAGGED)
    held, twin = everything(store), store.copy()
    assert_same(everything(twin), held)
    own = {x.data_ptr() for _, x in store.storages() if x.numel()} | {x.data_ptr() for x in store.shared()}
    assert not own & ({x.data_ptr() for _, x in twin.storages()} | {x.data_ptr() for x in twin.shared()})
    put(twin, (0, 1, 2), *tokens(8 * store.grain, 800))
    assert_same(everything(store), held)
    grown_twin = everything(twin)
    put(store, (0, 1, 2), *tokens(2 * store.grain, 850))
    assert_same(everything(twin), grown_twin)


# --------------------------------------------------------------------------------------------------------------- bytes
@codecs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_used_bytes_are_what_the_formulas_say_and_storages_have_little_more(codec, dtype):
    store = empty_store(codec)
    for i in range(12):  # on the way segments merge
        put(store, (0, 1, 2), *tokens(-(-64 // store.grain) * store.grain, 2 * i, dtype=dtype))
    total, size = 0.0, dtype.itemsize
    for form in store.forms:
        if form.paged:
            continue
        plain = form.bytes_per_token(D, itemsize=size)
        found = float(store.counts.sum()) * plain
        for span, name in ((SEGMENT, "n"), (MERGED, "merged")):
            for n in (length for row in store.lengths.get(span, ()) for length in row):
                found += n * (form.bytes_per_token(D, itemsize=size, **{name: n}) - plain)
        total += found * (HEADS if form.scope == "head" else 1)
    total += sum(size for sizes in store.sizes.values() for row in sizes for size in row)
    patches = list(store.rows.get(PATCH, empty_store("kv4").rows[1]).parts.values())
    exact = store.rows[PATCH].counts.sum() if patches else 0
    total += sum(int(exact) * x[0, :, 0].nbytes for x in patches)
    assert sum(store.used().values()) == round(total)
    allocated = {}
    for tier, x in store.storages():
        allocated[tier] = allocated.get(tier, 0) + x.nbytes
    assert allocated.keys() == store.used().keys()
    for held in (*store.rows.values(), *store.pages.values()):
        most = int(held.counts.max())
        for x in held.parts.values():
            assert most <= x.shape[2] <= most + slack(most)


def test_what_a_segment_or_a_group_shares_has_no_more_slack_than_its_tokens():
    """64 spare entries of ranges would be 64 groups of tokens."""
    store = filled("kivi(group=8)", [((0, 1, 2), 8)] * 4)
    assert store.rows[8].parts["k.range"].shape[2] * 8 <= store.counts.max() + slack(store.counts.max())
    store = filled("kivi(bits=4, group=0)", [((0, 1, 2), 100)] * 4)
    assert store.rows[SEGMENT].parts["k.range"].shape[2] <= 5


@codecs
def test_what_moves_lies_in_host_memory_and_the_rest_on_the_device(codec):
    forms = method_of(codec).forms()
    for sides in ("", "v", "kv"):
        store = filled(codec, RAGGED, sides=sides)
        wanted = {f"{side}.{name}" for side, form in zip("kv", forms, strict=True) for name in form.moving if side in sides}
        assert store.host == wanted
        assert_same(everything(store), everything(filled(codec, RAGGED)))
        paged = any(form.paged for form in forms)
        assert ("host" in store.used()) == (bool(wanted) or paged)
    away = filled(codec, RAGGED, away=True)
    assert set(away.used()) == {"host"}
    assert_same(everything(away), everything(filled(codec, RAGGED)))


@picked
def test_copies_that_were_brought_are_read_instead_of_what_the_host_has(codec):
    store = filled(codec, RAGGED, sides="kv")
    ids = torch.stack([cloud(r, HEADS, 20).mul(1e4).long() % int(n) for r, n in enumerate(store.counts)])
    moving = {name: take(store.own[name], ids, HEADS) for name in store.host}
    expected = {side: read(store, side, store.take(side, ids, at())) for side in "kv"}
    for name in store.host:
        store.own[name].zero_()
    for side in "kv":
        assert torch.equal(read(store, side, store.take(side, ids, at(), moving)), expected[side])


# ------------------------------------------------------------------------------------------- what is fitted, segments
FITTED = ["kv4(smooth=0.5)", "low_rank(rank=6, chunk=4)"]


@pytest.mark.parametrize("codec", FITTED)
def test_a_rows_first_tokens_decide_for_its_later_ones(codec):
    store = empty_store(codec)
    put(store, (0, 2), *(x[:2] for x in tokens(4 * store.grain, 0)))
    first = {name: x.clone() for name, x in store.fixed.items()}
    assert first
    put(store, (1,), *(3 * x[:1] for x in tokens(4 * store.grain, 10)))
    put(store, (0, 1, 2), *(9 * x for x in tokens(4 * store.grain, 20)))
    for name, x in store.fixed.items():
        assert torch.equal(x[[0, 2]], first[name][[0, 2]])
        assert not torch.equal(x[1], x[0])
        alone = empty_store(codec)
        put(alone, (1,), *(3 * x[:1] for x in tokens(4 * store.grain, 10)))
        torch.testing.assert_close(x[1], alone.fixed[name][1])


@pytest.mark.parametrize("codec", FITTED)
def test_a_row_that_begins_later_does_not_fit_others_anew(codec):
    """Rows that begin beside rows that go on."""
    store = empty_store(codec)
    put(store, (0,), *(x[:1] for x in tokens(4 * store.grain, 0)))
    before, first = everything(store)["k"][0], {name: x[0].clone() for name, x in store.fixed.items()}
    put(store, (0, 1), *(9 * x[:2] for x in tokens(4 * store.grain, 20)))
    assert all(torch.equal(x[0], first[name]) for name, x in store.fixed.items())
    assert torch.equal(everything(store)["k"][0][:, : before.shape[1]], before)


def test_a_whole_prompt_can_be_fitted_before_it_comes_in_pieces():
    store, k, v = empty_store("kv4(smooth=0.5)", 1), *tokens(64, 0, batch=1)
    k[:, :, 60] *= 30
    position = torch.arange(64).expand(1, HEADS, -1)
    store.fit(np.array([0]), k, v, position)
    for lo in (0, 32):
        store.append(np.array([0]), *(x[:, :, lo : lo + 32] for x in (k, v)), position[..., lo : lo + 32])
    torch.testing.assert_close(store.fixed["k.smooth"].float()[:, :, 0], k.abs().amax(2).sqrt(), atol=0, rtol=1e-3)


def test_segments_end_where_their_tokens_do():
    store = empty_store("kivi(bits=4, group=0)")
    for i, (rows, m) in enumerate([((0, 1), 5), ((1,), 3), ((0, 1), 7)]):
        put(store, rows, *(x[list(rows)] for x in tokens(m, 2 * i)))
    never = torch.iinfo(torch.int32).max
    assert store.lengths == {SEGMENT: [(5, 7), (5, 3, 7), ()]}
    assert store.ends[SEGMENT].tolist() == [[5, 12, never], [5, 8, 15], [never] * 3]
    whole = store.piece("k", 0, 15, at()).segment(SEGMENT).expand(BATCH, 1, -1)[:, 0]
    assert whole[0, :12].tolist() == [0] * 5 + [1] * 7
    assert whole[1].tolist() == [0] * 5 + [1] * 3 + [2] * 7
    ids = torch.tensor([[[4, 5, 11]], [[14, 8, 7]], [[0, 0, 0]]])
    assert store.take("k", ids, at()).segment(SEGMENT)[:2, 0].tolist() == [[0, 1, 1], [2, 2, 1]]
    store.reorder(torch.tensor([1, 1, 0]))
    assert store.ends[SEGMENT].tolist() == [[5, 8, 15], [5, 8, 15], [5, 12, never]]


def test_alike_segments_become_one_and_odd_ones_stay():
    store = empty_store("gear_l")
    put(store, (0, 1), *(x[:2] for x in tokens(100, 0)))  # a prompt
    for i in range(ALIKE - 1):
        put(store, (0,), *(x[:1] for x in tokens(4, 2 + i)))
    assert store.lengths[MERGED][0] == (100, *[4] * (ALIKE - 1))
    put(store, (0, 1), *(x[:2] for x in tokens(4, 50)))
    assert store.lengths[MERGED] == [(100, 4 * ALIKE), (100, 4), ()]
    assert store.rows[MERGED].counts.tolist() == [2, 2, 0]
    assert store.ends[MERGED][0].tolist() == [100, 100 + 4 * ALIKE]
    for i in range(ALIKE * (ALIKE - 1)):  # and merged ones among themselves
        put(store, (0,), *(x[:1] for x in tokens(4, 100 + i)))
    assert store.lengths[MERGED][0] == (100, 4 * ALIKE**2)


def test_segments_do_not_grow_beyond_the_longest_that_is_encoded_at_once():
    store, piece = empty_store("gear_l(rank=1)", 1, 1), LONGEST // 4
    for i in range(ALIKE):
        k, v = tokens(piece, i, 1, 1)
        store.append(np.array([0]), k, v, torch.arange(piece).expand(1, 1, -1))
    assert store.lengths[MERGED][0] == (piece,) * ALIKE


def test_a_merged_segment_keeps_what_its_rank_can_and_forgets_little_else():
    """Eight segments whose errors are of one kind: the merged factors are as good as theirs together."""
    (form, _), direction = method_of("gear_l(bits=2, group=8, rank=1)").forms(), cloud(3, D)
    stores = empty_store("gear_l(bits=2, group=8, rank=1)", 1, 1), empty_store("gear_l(bits=2, group=8, rank=1)", 1, 1)
    given = []
    for i in range(ALIKE):
        k = cloud(i, 1, 1, 8, 1) * direction + 0.01 * cloud(100 + i, 1, 1, 8, D)
        given.append(k)
        for store in stores[: 1 if i == ALIKE - 1 else 2]:
            store.append(np.array([0]), k, k, torch.arange(8 * i, 8 * i + 8).expand(1, 1, -1))
    merged, apart = (everything(store, BASE[:1])["k"][0] for store in stores)
    assert [len(store.lengths[MERGED][0]) for store in stores] == [1, ALIKE - 1]
    exact = torch.cat(given, 2)[0]
    assert form.rank == 1
    m = apart.shape[1]
    error, before = ((x[:, :m] - exact[:, :m]).norm() for x in (merged, apart))
    assert error < 1.5 * before + 0.05 * exact.norm()


# ------------------------------------------------------------------------------------------------------------- drafts
@picked
def test_a_cheaper_reading_is_of_the_same_tokens(codec):
    store = filled(codec, RAGGED, sides="kv")
    cheap = store.drafting()
    assert cheap.counts is store.counts
    assert cheap.host <= store.host
    assert cheap.forms == tuple(form.draft() for form in store.forms)
    a, b = everything(store), everything(cheap)
    if cheap.forms == store.forms:
        assert_same(a, b)
    else:
        step = 0.5  # of four bits
        assert_same(a, b, atol=step)
        assert any(not torch.equal(x, y) for x, y in zip(a["k"], b["k"], strict=True))


# ------------------------------------------------------------------------------------------------------ forms at large
@codecs
def test_forms_say_of_themselves_what_is_so(codec):
    for form in method_of(codec).forms():
        assert isinstance(form, Form)
        assert form.moving <= frozenset(form.spans)
        assert all(form.grain % span == 0 for span in form.spans.values() if span > 0)
        assert form.evict_granularity % form.grain == 0
        assert form.exact == isinstance(form, Dense) or form.paged
        assert form.draft().spans.keys() <= form.spans.keys()
        form.check("codec", D)
