"""Host memory, the lane, and walks over a body."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from kvlib.offload.transfer import Lane, as_rows, host_empty, stream
from tests.offload.streams import HOST, LANE, MAIN, Streams, needs_gpu


def body(batch=2, heads=3, cap=20, dtype=torch.float32):
    k = torch.arange(batch * heads * cap * 4).view(batch, heads, cap, 4).to(dtype)
    return {"k": k, "scale": -k[..., 0].contiguous()}


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 17, 20])
@pytest.mark.parametrize("piece", [1, 5, 6, 20, 100])
@pytest.mark.parametrize("played", [False, True])
def test_a_walk_yields_everything_once_in_order(monkeypatch, stop, piece, played):
    parts, seen, spans = body(), [], []
    if played:
        with Streams(monkeypatch) as play:
            for x in parts.values():
                play.pin(x)
            for first, last, piece_of in stream(parts, stop, piece, "cpu"):
                if last < stop:
                    assert play.clock[MAIN, LANE] < play.clock[LANE, LANE]  # the next is under way, nobody waits for it
                spans.append((first, last))
                seen.append({name: x.clone() for name, x in piece_of.items()})
            assert play.clock[HOST, LANE] == 0
            play.check_memory()
    else:
        for first, last, piece_of in stream(parts, stop, piece, "cpu"):
            spans.append((first, last))
            assert all(x.untyped_storage()._cdata == parts[n].untyped_storage()._cdata for n, x in piece_of.items())
            seen.append(piece_of)
    assert spans == [(i, min(i + piece, stop)) for i in range(0, stop, piece)]
    for name, x in parts.items():
        assert torch.equal(torch.cat([x[:, :, :0], *(s[name] for s in seen)], 2), x[:, :, :stop])


def test_a_walk_holds_two_pieces(monkeypatch):
    parts, storages = body(), set()
    with Streams(monkeypatch):
        for _, _, piece in stream(parts, 20, 3, "cpu"):
            storages.add(piece["k"].untyped_storage()._cdata)
            assert piece["k"].untyped_storage().nbytes() == 2 * 3 * 3 * 4 * 4
    assert len(storages) == 2


def test_a_walk_given_up_midway_or_begun_in_inference_mode(monkeypatch):
    parts = body()
    with Streams(monkeypatch) as play:
        walk = stream(parts, 20, 6, "cpu")
        next(walk)
        walk.close()
        play.check_memory()
    walk = stream(parts, 20, 6, "cpu")
    with torch.inference_mode():
        next(walk)
    assert [first for first, _, _ in walk] == [6, 12, 18]


@pytest.mark.parametrize(("stop", "piece"), [(21, 5), (-1, 5), (20, 0)])
def test_a_walk_beyond_the_body_is_refused_at_once(stop, piece):
    with pytest.raises(ValueError, match="cannot walk"):
        stream(body(), stop, piece, "cpu")


@pytest.mark.parametrize(("width", "dtype", "run", "word"), [(4, torch.float32, 1, 16), (3, torch.bfloat16, 2, 2)])
def test_rows_are_views_in_words_of_16_bytes_where_they_can(width, dtype, run, word):
    x = torch.zeros(2, 3, 8, width, dtype=dtype)
    rows = as_rows(x, run)
    assert (rows.shape, rows.itemsize) == ((2 * 3, 8 // run, run * width * x.itemsize // word), word)
    assert rows.data_ptr() == x.data_ptr()


def test_host_memory_can_be_written_in_any_mode():
    with torch.inference_mode():
        x = host_empty((2, 3), torch.bfloat16, "cpu")
    assert (x.shape, x.dtype, x.is_pinned(), x.is_inference()) == ((2, 3), torch.bfloat16, False, False)
    x += 1


def test_there_is_one_lane_per_device_and_none_on_the_cpu():
    lane = Lane.of("cpu")
    assert lane is Lane.of(torch.device("cpu"))
    assert (lane.stream, lane.mark()) == (None, None)


@pytest.mark.parametrize("fault", ["", "work", "join", "share"])
def test_each_rule_of_the_lane_is_needed_and_the_played_streams_see_it_broken(monkeypatch, fault):
    with pytest.raises(AssertionError) if fault else nullcontext(), Streams(monkeypatch) as play:
        lane, x = Lane.of("cpu"), torch.ones(8)
        with lane.work(ordered=fault != "work"):
            y = x + 1
        mark = lane.mark()
        if fault != "join":
            lane.join(mark)
        y += 1
        if fault != "share":
            lane.share(x, y)
        play.check_memory()


@needs_gpu
def test_the_lane_of_a_gpu():
    lane = Lane.of("cuda")
    assert lane is Lane.of(torch.device("cuda", torch.cuda.current_device()))
    parts = {name: host_empty(tuple(x.shape), x.dtype, "cuda").copy_(x) for name, x in body(cap=3000).items()}
    assert all(x.is_pinned() for x in parts.values())
    pieces = []
    for _, _, piece in stream(parts, 2999, 256, "cuda"):
        torch.cuda._sleep(1_000_000)
        pieces.append({name: x.clone() for name, x in piece.items()})
    for name, x in parts.items():
        assert torch.equal(torch.cat([p[name] for p in pieces], 2).cpu(), x[:, :, :2999])


@needs_gpu
def test_page_locked_memory_stays_untouched_while_the_lane_reads_it():
    lane, shape = Lane.of("cuda"), (1 << 20,)
    freed = host_empty(shape, torch.float32, "cuda")
    torch.cuda.synchronize()
    with lane.work():
        torch.cuda._sleep(100_000_000)
    place = freed.data_ptr()
    del freed
    other = host_empty(shape, torch.float32, "cuda")
    assert other.data_ptr() != place
    torch.cuda.synchronize()
    assert host_empty(shape, torch.float32, "cuda").data_ptr() == place


SMAPS = Path("/proc/self/smaps")


def _flags(address):
    """What the kernel says of the mapping that `address` lies in: flags of two letters."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping with flags holds {address:#x}")


@pytest.mark.skipif(
    not SMAPS.exists() or "VmFlags" not in SMAPS.read_text(), reason="needs Linux that tells the flags of a mapping"
)
def test_large_buffers_ask_for_large_pages():
    # Whether the system has such pages left to give is its own affair.
    host = host_empty((64 << 20,), torch.uint8, "cpu")
    assert "hg" in _flags(host.data_ptr() + host.nbytes // 2)
