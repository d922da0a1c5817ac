"""Rows are copied bit for bit from where they are wanted to where they belong, and nothing else is touched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.kernels import gather_host as module
from kvlib.kernels.gather_host import copied, gather_host, launched
from kvlib.offload.transfer import Lane, host_empty
from tests.kernels.poison import DEVICE
from tests.offload.streams import needs_gpu

LISTS, ROWS, SLOTS = 3, 11, 7


def anything(lists, rows, words, dtype):
    """Rows of any bits, among them those of many a NaN, in memory that a kernel can read."""
    size = torch.empty(0, dtype=dtype).itemsize
    bits = torch.randint(0, 256, (lists, rows, words * size), dtype=torch.uint8)
    return host_empty((lists, rows, words), dtype, DEVICE).copy_(bits.view(dtype))


def orders(lists, rows, slots, n, share):
    """Rows and distinct slots [lists, n]; where nothing is wanted, the slots are nonsense."""
    wanted = torch.randint(0, rows, (lists, n))
    place = torch.rand(lists, slots).argsort(-1)[:, :n]
    absent = torch.rand(lists, n) >= share
    return wanted.masked_fill(absent, -1), place.masked_fill(absent, 10**9)


def as_bytes(x):
    return x.cpu().contiguous().view(torch.uint8)


def run(source, slots, wanted, place):
    """The target, after comparing it with one filled row by row."""
    before = torch.randint(0, 256, (len(source), slots, source.shape[2] * source.itemsize), dtype=torch.uint8)
    want, rows = before.clone(), as_bytes(source)
    for own, (runs, places) in enumerate(zip(wanted.tolist(), place.tolist(), strict=True)):
        for r, p in zip(runs, places, strict=True):
            if r >= 0:
                want[own, p] = rows[own, r]
    for copy in (launched, gather_host):
        target = before.view(source.dtype).to(DEVICE).contiguous()
        copy(source, target, wanted.to(DEVICE), place.to(DEVICE))
        assert torch.equal(as_bytes(target), want)
    here = before.view(source.dtype).clone()
    copied(source.cpu(), here, wanted, place)
    assert torch.equal(as_bytes(here), want)


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        (1, torch.uint8),
        (5, torch.uint8),
        (3, torch.bfloat16),
        (64, torch.float16),
        (128, torch.bfloat16),
        (1, torch.float32),
        (33, torch.float32),
        (1, torch.complex128),
        (7, torch.int64),
        (1023, torch.float64),  # a tile of 1024 words, and around it
        (1024, torch.float64),
        (1025, torch.float64),
        (600, torch.complex128),
    ],
)
def test_rows_of_any_type_and_width(words, dtype):
    run(anything(LISTS, ROWS, words, dtype), SLOTS, *orders(LISTS, ROWS, SLOTS, 5, 0.7))


@pytest.mark.parametrize(("lists", "n"), [(1, 0), (0, 3), (1, 1), (1, 15), (2, 16), (1, 17), (3, 40)])
def test_any_number_of_orders(lists, n):
    run(anything(lists, ROWS, 64, torch.int64), 50, *orders(lists, ROWS, 50, n, 0.5))


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 20), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 10**6))
def test_any_orders(words, lists, n, share, seed):
    torch.manual_seed(seed)
    run(anything(lists, ROWS, words, torch.int16), 21, *orders(lists, ROWS, 21, n, share))


def test_few_programs_walk_many_tiles(monkeypatch):
    monkeypatch.setattr(module, "_PROGRAMS", 3)
    run(anything(2, ROWS, 700, torch.int64), 20, *orders(2, ROWS, 20, 16, 0.6))


def test_the_same_row_may_be_wanted_twice_and_lists_do_not_mix():
    source = anything(2, ROWS, 8, torch.float32)
    run(source, SLOTS, torch.tensor([[4, 4], [4, -1]]), torch.tensor([[0, 6], [3, 0]]))


def test_the_operator_is_sound():
    source, target = anything(2, ROWS, 16, torch.int32).cpu(), torch.zeros(2, SLOTS, 16, dtype=torch.int32)
    torch.library.opcheck(gather_host, (source, target, *orders(2, ROWS, SLOTS, 5, 0.8)))  # whose copies are not pinned


@needs_gpu
def test_the_device_says_what_it_wants_while_the_host_goes_on():
    source, lane = anything(8, 4096, 512, torch.int64), Lane.of("cuda")
    target = torch.zeros(8, 1024, 512, dtype=torch.int64, device="cuda")
    wanted, place = (x.cuda() for x in orders(8, 4096, 1024, 1000, 0.5))
    lane.share(target, wanted, place)
    with lane.work():
        torch.cuda._sleep(200_000_000)
        gather_host(source, target, wanted, place)
    mark = lane.mark()
    assert not mark.query()
    lane.join(mark)
    want = torch.zeros_like(target, device="cpu")
    copied(source, want, wanted.cpu(), place.cpu())
    assert torch.equal(target.cpu(), want)
