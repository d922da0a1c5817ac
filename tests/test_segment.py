from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.candidates import Candidates
from kvlib.segment import TILE, Layout, Spec, Tail, slack
from tests.reference import causal, reference

steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 90), st.lists(st.floats(0, 1), min_size=3, max_size=3)),
        st.tuples(st.just("drop"), st.lists(st.floats(0, 1), min_size=3, max_size=3)),
        st.tuples(st.just("take back"), st.integers(1, 5)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
        st.tuples(st.just("retract"), st.lists(st.floats(0, 1), min_size=3, max_size=3)),
        st.tuples(st.just("snapshot")),
    ),
    min_size=1,
    max_size=12,
)


@given(steps)
def test_tail_is_a_list_per_row(script):
    """Whatever happens to a tail, each row holds its own tokens in order, and the slack stays small."""
    rows = [[], [], []]
    tail, clock, snapshots = None, 0, []
    for what, *arguments in script:
        if what == "append":
            n, shares = arguments
            new = np.array([round(share * n) for share in shares])
            x = torch.full((3, 1, n, 1), float("nan"))
            for r in range(3):
                fresh = [clock + i for i in range(new[r])]
                x[r, 0, n - new[r] :, 0] = torch.tensor(fresh, dtype=torch.float32)
                rows[r] += fresh
            clock += n
            tail = tail or Tail(x, x, ("mass",))
            tail.append(x, x, None if (new == n).all() else new)
            for r in range(3):
                tail.fields["mass"][r, 0, tail.end - new[r] : tail.end] = x[r, 0, n - new[r] :, 0]
        elif tail is not None and what == "drop":
            oldest = np.array([int(share * len(row)) for share, row in zip(arguments[0], rows, strict=True)])
            tail.drop(oldest)
            rows = [row[m:] for row, m in zip(rows, oldest, strict=True)]
        elif tail is not None and what == "take back":
            n = min(arguments[0], *map(len, rows))
            tail.take_back(n)
            rows = [row[: len(row) - n] for row in rows]
        elif tail is not None and what == "reorder":
            tail.reorder(torch.tensor(arguments[0]))
            rows = [list(rows[i]) for i in arguments[0]]
        elif tail is not None and what == "retract":
            hidden = np.array([int(share * len(row)) for share, row in zip(arguments[0], rows, strict=True)])
            tail.retract(hidden)
            rows = [row[: len(row) - m] for row, m in zip(rows, hidden, strict=True)]
        elif tail is not None and what == "snapshot":
            snapshots.append((tail.snapshot(), [list(row) for row in rows]))
        for kept, before in snapshots:
            for r, row in enumerate(before):
                assert kept.k[r, 0, int(kept.starts[r]) : kept.end, 0].tolist() == row
        if tail is not None:
            assert tail.lengths.tolist() == [len(row) for row in rows]
            for r, row in enumerate(rows):
                assert tail.k[r, 0, int(tail.starts[r]) : tail.end, 0].tolist() == row
                assert tail.v[r, 0, int(tail.starts[r]) : tail.end, 0].tolist() == row
                assert tail.fields["mass"][r, 0, int(tail.starts[r]) : tail.end].tolist() == row
            longest = max(map(len, rows))
            assert tail.k.shape[2] <= longest + slack(longest) + 90  # 90: padding of a chunk not yet dropped


def test_snapshots_and_copies_are_left_alone():
    x = torch.arange(100.0).view(1, 1, 100, 1)
    tail = Tail(x, x)
    tail.append(x, x, None)
    tail.drop(np.array([90]))
    before, twin = tail.snapshot(), tail.copy()
    for _ in range(40):
        tail.append(-x[:, :, :7], -x[:, :, :7], None)
        tail.drop(np.array([7]))
    for kept in (before, twin):
        assert kept.k[0, 0, kept.begin : kept.end, 0].tolist() == list(range(90, 100))


counts = st.lists(st.integers(0, 3 * TILE), min_size=4, max_size=4)


@given(counts, st.integers(0, 2**16))
def test_tiles_hold_any_count_per_head_and_attend_exactly(wanted, seed):
    """Ragged tiles: the chosen tokens, their attention, mass, positions, and a reordered batch."""
    torch.manual_seed(seed)
    keys, d = 3 * TILE, 8
    k, v = torch.randn(2, 2, keys, d), torch.randn(2, 2, keys, d)
    tail = Tail(k, v, ("mass",))
    tail.append(k, v, None)
    tail.fields["mass"][:, :, :keys] = torch.rand(2, 2, keys)
    slot = torch.arange(keys).expand(2, 2, keys)
    keep = torch.zeros(2, 2, keys, dtype=torch.bool)
    for i, n in enumerate(wanted):
        keep[i // 2, i % 2, torch.randperm(keys)[:n]] = True
    tiles = Candidates(None, tail, slot, slot).gather(keep)
    if tiles is None:
        assert not any(wanted)
        return
    assert tiles.counts.ravel().tolist() == wanted
    q, spec = torch.randn(2, 4, 3, d), Spec(0.4)
    mask = keep.repeat_interleave(2, 1)[:, :, None].expand(2, 4, 3, keys)
    out, lse, p = reference(q, k, v, 0.4, mask)
    part = tiles.attend(q, spec)
    torch.testing.assert_close(part.out.double(), out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(part.lse.double(), lse, atol=1e-5, rtol=1e-5)
    for other in (tiles.attend_ranges(q, spec), replace(tiles, k=tiles.k.clone()).attend_ranges(q, spec)):
        torch.testing.assert_close(other.out, part.out, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(other.lse, part.lse, atol=1e-6, rtol=1e-5)
    mass = tiles.column_mass(q, part.lse, spec).flatten()
    single = tiles.attend(q[:, :, :1], spec, probabilities=True)
    alone = tiles.mass_of(single.p, torch.ones(2, 4, 1)).flatten()
    for i in range(4):
        r, h = divmod(i, 2)
        chosen = keep[r, h].nonzero().flatten()
        slots = tiles.slots()[r, h]
        slots = slots[slots >= 0]
        assert tiles.positions.flatten()[slots].tolist() == chosen.tolist()
        assert torch.equal(tiles.fields["mass"].flatten()[slots], tail.fields["mass"][r, h, chosen])
        expected = p.view(2, 2, 2, 3, keys)[r, h][:, :, chosen]
        torch.testing.assert_close(mass[slots].double(), expected.sum((0, 1)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone[slots].double(), expected[:, 0].sum(0), atol=1e-5, rtol=1e-4)
    rows = torch.tensor([1, 1, 0])
    moved = tiles.reorder(rows).attend(q[rows], spec)
    torch.testing.assert_close(moved.out, part.out[rows])


def test_slots_past_a_heads_count_cost_less_than_a_tile_each():
    for n in ([5, 5, 5, 5], [0, TILE, 3, 9], [0, 500, 3, 9]):
        layout = Layout.of(np.array(n).reshape(2, 2))
        assert layout.tiles * layout.width - sum(n) <= 4 * TILE
    assert Layout.of(np.full((2, 2), 500)).segment is None


def test_causal_helper():
    assert causal(2, 3).tolist() == [[True, True, False], [True, True, True]]
