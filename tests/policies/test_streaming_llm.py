import torch

from kvlib import census
from kvlib.segment import Spec
from tests.driver import feed, group_for, held, keys


def test_known_answer():
    group = group_for("streaming_llm(sink=4, recent=4) + block=1")
    feed(group, [[1.0 / (i + 1)] * (i + 1) for i in range(10)])
    assert held(group) == [0, 1, 2, 3, 6, 7, 8, 9]


def test_a_step_sees_the_sinks_and_the_window_and_nothing_that_waits():
    group = group_for("streaming_llm(sink=2, recent=5) + block=8")
    for i in range(40):
        k, v = keys(i, 1)
        out = group.forward(torch.zeros(1, 1, 1, 64), k, v, None, Spec(1.0), recording=False)
        seen = (out[0, 0, 0] > 0).nonzero().flatten().tolist()
        assert seen == sorted({*range(min(2, i + 1)), *range(max(0, i - 4), i + 1)})
        assert len(held(group)) <= 2 + 5 + 8


def test_exact_prompt_queries_see_what_a_step_sees_however_chunked():
    for sizes in ([40], [7] * 5 + [5], [1] * 40, [30, 10]):
        group, first = group_for("streaming_llm(sink=2, recent=5, exact=True)"), 0
        for n in sizes:
            k, v = keys(first, n)
            out = group.forward(torch.zeros(1, 1, n, 64), k, v, None, Spec(1.0), recording=False)
            for i in range(first, first + n):
                seen = (out[0, 0, i - first] > 0).nonzero().flatten().tolist()
                assert seen == sorted({*range(min(2, i + 1)), *range(max(0, i - 4), i + 1)})
            first += n


def test_memory_does_not_grow():
    group = group_for("streaming_llm(sink=4, recent=32)")
    k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    sizes = set()
    for i in range(2000):
        group.forward(torch.randn(1, 4, 1, 8), k, v, None, Spec(1.0), recording=False)
        if i > 200:
            sizes.add(sum(census.nbytes(group, used=False, seen=set()).values()))
    assert len(sizes) == 1
