"""Slots for the most recently fetched runs."""

import random
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.offload.account import allocated
from kvlib.offload.resident import Resident
from kvlib.offload.transfer import host_empty
from tests.offload.life import BYTES, HEADS, Host, Script, bits, expected, tokens_of
from tests.offload.streams import HOST, LANE, MAIN, Streams, needs_gpu

steps = st.lists(
    st.one_of(
        st.tuples(st.just("fetch"), st.integers(0, 9), st.integers(0, 9999), st.sampled_from([None, 1.0, 0.7, 0.0])),
        st.tuples(st.just("fetch"), st.integers(2, 5), st.integers(0, 9999), st.just(None)),
        st.tuples(st.just("abandon"), st.integers(0, 9), st.integers(0, 9999)),
        st.tuples(st.just("reserve"), st.integers(0, 8)),
        st.tuples(st.just("grow"), st.integers(0, 6)),
        st.tuples(st.just("rewrite"), st.integers(0, 5), st.integers(0, 9), st.integers(0, 6)),
        st.tuples(st.just("shrink"), st.lists(st.integers(0, 12), min_size=3, max_size=3), st.booleans()),
        st.tuples(st.just("give_back"), st.integers(0, 12)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        st.tuples(st.just("copy"), st.integers(0, 9999)),
        st.tuples(st.just("clear")),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=150)
@given(steps, st.sampled_from([1, 3, 4]))
def test_slots_are_an_lru_per_head_and_hold_what_the_host_has(script, run):
    life = Script(run)
    for what, *arguments in script:
        getattr(life, what)(*arguments)
    life.finish()


@settings(max_examples=60)
@given(steps, st.sampled_from([1, 4]))
def test_no_two_streams_race_and_nothing_stops_the_host(script, run):
    with pytest.MonkeyPatch.context() as monkeypatch:
        play = Streams(monkeypatch)
        life = Script(run, play)
        for what, *arguments in script:
            getattr(life, what)(*arguments)
        life.finish()
        play.check_memory()


def test_the_host_waits_for_nobody_nor_do_the_copies(monkeypatch):
    """Misses travel while the hits are attended: neither does the lane wait for that nor the host for the lane."""
    play = Streams(monkeypatch)
    life = Script(1, play)
    life.fetch(2, 0, None)
    runs = torch.tensor([0, 1, 2]).expand(2, HEADS, 3)
    before = play.clock[MAIN, MAIN]
    fetch = life.call(life.resident.fetch, life.host.parts, runs)
    asked, issued = play.clock[MAIN, MAIN], play.clock[LANE, LANE]
    assert play.clock[MAIN, LANE] < issued
    life.call(lambda: (life.resident.take("k", fetch.slots), fetch.wait()))
    assert before < play.clock[LANE, MAIN] <= asked < play.clock[MAIN, MAIN]
    assert play.clock[LANE, LANE] == issued == play.clock[MAIN, LANE]  # the copies were on their way before anybody waited
    assert (play.clock[HOST, [MAIN, LANE]] == 0).all()


@pytest.mark.parametrize(("slot", "fault"), [(1, False), (5, True), (2, True)])
def test_while_misses_travel_only_the_slots_of_hits_may_be_read(monkeypatch, slot, fault):
    play = Streams(monkeypatch)
    life = Script(1, play)
    life.reserve(5)
    for wanted in ([0, 1], [2, 3], [0, 4, 5]):
        fetch = life.call(life.resident.fetch, life.host.parts, torch.tensor(wanted).expand(2, HEADS, -1))
        if wanted != [0, 4, 5]:
            life.call(fetch.wait)
    with pytest.raises(AssertionError, match="races") if fault else nullcontext():
        life.call(life.resident.take, "k", torch.full((2, HEADS, 1), slot))
    life.call(fetch.wait)
    assert fetch.slots[0, 0].tolist() == [1, 5, 2]  # a hit, a slot not used before, and that of run 1
    life.call(life.resident.take, "k", torch.full((2, HEADS, 1), slot))


@pytest.mark.parametrize("writer", ["stream too early", "stream", "host too early", "host"])
def test_host_buffers_are_written_behind_the_wait(monkeypatch, writer):
    play = Streams(monkeypatch)
    life = Script(1, play)
    runs = torch.tensor([0, 1, 2]).expand(2, HEADS, 3)

    def write():
        fetch = life.resident.fetch(life.host.parts, runs)
        if writer != "stream too early":
            fetch.wait()
        if writer == "host":
            torch.cuda.current_stream("cpu").synchronize()
        fresh = torch.zeros(2, HEADS, 4)
        life.host.parts["k"][:, :, 1] = fresh if writer.startswith("stream") else play.pin(fresh)

    with pytest.raises(AssertionError, match="overwrites") if "early" in writer else nullcontext():
        life.call(write)


def test_the_least_recently_fetched_run_gives_way_and_ties_go_to_the_lower_slot():
    host = Host(1, 20)
    resident = Resident(1, HEADS, 1, "cpu")
    resident.reserve(4, host.parts)

    def slots(*runs):
        fetch = resident.fetch(host.parts, torch.tensor([runs] * HEADS)[None])
        fetch.wait()
        assert (fetch.slots[0, 0] == fetch.slots[0, 1]).all()
        return fetch.slots[0, 0].tolist()

    assert slots(7, 3) == [1, 2]
    assert slots(5) == [3]
    assert slots(3, 9) == [2, 4]
    assert slots(8) == [1]  # 7 was fetched first
    assert slots(7) == [3]  # then 5
    assert slots(1, 2, 0) == [2, 4, 1]  # then 3 and 9, together, then 8
    assert slots(0, 7, 1, 2) == [1, 3, 2, 4]
    assert slots(4, 2, 6, 1) == [1, 4, 3, 2]  # no hit gives way to a miss, whatever its age
    assert resident.counts() == (7 * HEADS, 11 * HEADS, 11 * HEADS * BYTES)


def test_nothing_is_copied_when_all_is_resident():
    """The host's buffers are not even read: what they hold by now is something else."""
    host = Host(2, 16)
    resident = Resident(2, HEADS, 4, "cpu")
    resident.reserve(4, host.parts)
    runs = torch.tensor([3, 0, 2, 1]).expand(2, HEADS, 4)
    first = resident.fetch(host.parts, runs)
    assert first.most_missing == 4
    first.wait()
    old = {n: x.clone() for n, x in host.parts.items()}
    for row in range(2):
        host.rewrite(row, 0, 16)
    again = resident.fetch(host.parts, runs.flip(-1))
    assert again.hit.all() and again.most_missing == 0
    again.wait()
    for name, x in old.items():
        held = resident.take(name, tokens_of(again.slots, 4))
        assert torch.equal(bits(held), expected(x, runs.flip(-1), again.hit, 4))
    assert resident.counts() == (16, 16, 16 * 4 * BYTES)
    resident.forget(1, 2, 3)
    assert resident.fetch(host.parts, runs).hit.tolist() == [[[True] * 4] * 2, [[True, True, False, True]] * 2]


def test_a_fetch_that_cannot_be_is_refused_and_changes_nothing():
    host, other = Host(2, 12), Host(2, 12)
    resident = Resident(2, HEADS, 3, "cpu")
    runs = torch.arange(3).expand(2, HEADS, 3)
    with pytest.raises(ValueError, match="room for 0"):
        resident.fetch(host.parts, runs)
    resident.reserve(2, host.parts)
    resident.fetch(host.parts, runs[..., :2]).wait()
    with pytest.raises(ValueError, match="3 runs asked for, but there is room for 2"):
        resident.fetch(host.parts, runs)
    k, runs = host.parts["k"], runs[..., :2]
    for wrong in (k.half(), k[:1], k[..., :3].contiguous(), k[:, :, :11].contiguous(), k.transpose(0, 1)):
        with pytest.raises(ValueError, match="k: expected"):
            resident.fetch({**host.parts, "k": wrong}, runs)
    with pytest.raises(ValueError, match="room was made for"):
        resident.fetch({"k": k}, runs)
    with pytest.raises(RuntimeError, match="out of bounds"):
        resident.fetch(host.parts, runs + 3)
    assert resident.fetch(other.parts, runs).hit.all()
    assert resident.counts() == (8, 8, 8 * 3 * BYTES)


def test_memory_is_the_slots_and_one_blank_one_and_tables_without_slack():
    host = Host(2, 300)
    resident = Resident(2, HEADS, 3, "cpu")
    resident.reserve(20, host.parts)
    resident.fetch(host.parts, torch.arange(20).expand(2, HEADS, 20)).wait()
    assert allocated(resident.tensors()) == 2 * HEADS * (21 * (3 * BYTES + 8 + 8) + 101 * 4) + 2 * 8
    resident.reserve(7, host.parts)
    assert resident.room == 20


def test_the_host_buffers_are_let_go():
    k = np.ones((1, HEADS, 4, 4))
    alive, resident = weakref.ref(k), Resident(1, HEADS, 1, "cpu")
    parts = {"k": torch.from_numpy(k)}
    resident.reserve(2, parts)
    fetch = resident.fetch(parts, torch.zeros(1, HEADS, 1, dtype=torch.int64))
    fetch.wait()
    del k, parts
    assert alive() is None and fetch.hit.shape == (1, HEADS, 1)


def test_modes_mix():
    """What was made in inference mode is written without it later, and the other way round."""
    with torch.inference_mode():
        host = Host(2, 8)
        resident = Resident(2, HEADS, 2, "cpu")
        resident.reserve(2, host.parts)
        runs = torch.tensor([0, 1]).expand(2, HEADS, 2)
        pending = resident.fetch(host.parts, runs)
    pending.wait()
    resident.fetch(host.parts, runs + 1).wait()
    with torch.inference_mode():
        resident.reserve(3, host.parts)
        resident.reorder(torch.tensor([1, 0]))
        twin = resident.copy()
        host.grow(4)
        host.parts = {n: x[[1, 0]] for n, x in host.parts.items()}
        resident.fetch(host.parts, runs + 2)
    for one in (resident, twin):
        one.forget(0, 0, 1)
        one.forget_from(torch.tensor([4, 1]))
        fetch = one.fetch(host.parts, runs + 2)
        fetch.wait()
        for name, x in host.parts.items():
            assert torch.equal(bits(one.take(name, tokens_of(fetch.slots, 2))), expected(x, runs + 2, fetch.slots > 0, 2))
        one.clear()


@needs_gpu
def test_a_gpu_does_as_the_cpu_does():
    host, rng = Host(2, 4000), random.Random(0)
    parts = {n: host_empty(tuple(x.shape), x.dtype, "cuda").copy_(x) for n, x in host.parts.items()}
    here, there = Resident(2, HEADS, 4, "cpu"), Resident(2, HEADS, 4, "cuda")
    here.reserve(300, parts)
    there.reserve(300, parts)
    for step in range(30):
        runs = torch.tensor([rng.sample(range(700), 200) for _ in range(2 * HEADS)]).view(2, HEADS, 200)
        valid = torch.rand(runs.shape) < 0.9
        want, got = here.fetch(parts, runs, valid), there.fetch(parts, runs.cuda(), valid.cuda())
        torch.cuda._sleep(1_000_000)
        early = {n: there.take(n, tokens_of(got.slots, 4)) for n in parts}
        assert want.most_missing <= got.most_missing == 200
        if step % 5 == 4:
            continue
        want.wait()
        got.wait()
        late = {n: there.take(n, tokens_of(got.slots, 4)) for n in parts}
        assert torch.equal(got.slots.cpu(), want.slots) and torch.equal(got.hit.cpu(), want.hit)
        for name, x in parts.items():
            assert torch.equal(bits(early[name].cpu()), expected(x, runs, want.hit, 4))
            assert torch.equal(bits(late[name].cpu()), expected(x, runs, valid, 4))
        if step % 7 == 6:
            for one in (here, there):
                one.forget(1, 0, 300)
                one.reorder(torch.tensor([0, 1], device=one.device))
    assert here.counts() == there.counts()
