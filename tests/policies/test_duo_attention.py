import numpy as np
import pytest
import torch

import kvlib
from kvlib.hf import induction_gates
from kvlib.policies.heads.razor_attention import REPEATS, induction
from kvlib.policies.heads.table import HeadTable
from kvlib.testing import prompts, tiny_model
from tests.reference import causal, reference


def test_exactly_the_wanted_share_streams_and_ties_go_by_layer_and_head():
    table = HeadTable(np.array([[0.5, 0.5], [0.1, 0.5]]), "test")
    assert table.streaming(0.5).tolist() == [[True, False], [True, False]]
    assert table.streaming(0.0).sum() == 0
    assert table.streaming(1.0).all()
    assert table.implied_gate(table.streaming(0.25)) == 0.1
    assert table.streaming(0.5, np.array([True, False])).tolist() == [[True, False], [False, False]]


def test_table_file_round_trip_and_errors(tmp_path):
    table = HeadTable(np.array([[0.25, 1.0], [0.0, 0.5]]), "learnt", {"sink": 16})
    table.save(tmp_path / "heads.tsv")
    again = HeadTable.load(tmp_path / "heads.tsv")
    assert np.array_equal(again.gates, table.gates)
    assert again.header == {"sink": 16}
    for text in ("", "hello\n1\t2\n", '# {"format": "other"}\n1\t1\n', '# {"format": "kvlib-head-table-1"}\n1\tx\n'):
        (tmp_path / "bad.tsv").write_text(text)
        with pytest.raises(ValueError, match="no head table"):
            HeadTable.load(tmp_path / "bad.tsv")


def test_streaming_heads_really_free_their_memory(tmp_path):
    model = tiny_model()
    HeadTable(np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), "test").save(tmp_path / "heads.tsv")
    cache = kvlib.Cache(model, f"duo_attention(sparsity=0.5, heads='{tmp_path}/heads.tsv', sink=4, recent=16)")
    ids, _ = prompts(1, 96, 0)
    model.generate(ids, past_key_values=cache, max_new_tokens=17, do_sample=False)
    kept = cache.kept()[:, 0].tolist()
    assert [[n == 112 for n in layer] for layer in kept] == [[True, False], [False, False], [True, True]]
    assert all(20 <= n <= 24 for layer in kept for n in layer if n != 112)
    full = 112 * 6 * 2 * 16 * 4
    used = cache.nbytes(by="part", used=True)
    assert used["sink"] + used["body"] + used["tail"] == sum(map(sum, kept)) * 2 * 16 * 4 < 0.65 * full
    assert "0.000" in cache.report()


def test_a_table_of_another_model_is_refused(tmp_path):
    HeadTable(np.ones((2, 2)), "test").save(tmp_path / "heads.tsv")
    with pytest.raises(kvlib.RecipeError, match=r"\(2, 2\).*\(3, 2\)"):
        kvlib.Cache(tiny_model(), f"duo_attention(heads='{tmp_path}/heads.tsv')")
    with pytest.raises(kvlib.RecipeError, match="no such file"):
        kvlib.Cache(tiny_model(), "duo_attention(heads=missing.tsv)")


def test_induction_score_is_the_mean_of_the_shifted_diagonals():
    period = 9
    n = 1 + REPEATS * period
    q, k = torch.randn(1, 4, n, 8), torch.randn(1, 2, n, 8)
    p = reference(q, k, k, 0.7, causal(n, n))[2][0]
    expected = torch.zeros(4, dtype=torch.double)
    for row in range(1 + period, n):
        for copies in range(1, REPEATS):
            column = row - copies * period + 1
            if row - copies * period >= 1:
                expected += p[:, row, column]
    expected = (expected / (n - 1 - period)).view(2, 2).amax(1)
    torch.testing.assert_close(induction(q, k, 0.7, period)[0].double(), expected, atol=1e-6, rtol=1e-5)


def test_a_hand_built_copy_head_gets_score_one():
    period, n = 8, 1 + REPEATS * 8
    tokens = torch.tensor([0, *(list(range(1, period + 1)) * REPEATS)])
    k = torch.nn.functional.one_hot(torch.roll(tokens, 1), 16).float()  # a key says which token came before
    k[0] = 0
    q = 60 * torch.nn.functional.one_hot(tokens, 16).float()
    other = torch.zeros(n, 16)
    score = induction(torch.stack([q, other])[None], torch.stack([k, other])[None], 1.0, period)[0]
    assert score[0] > 0.99
    assert score[1] < 0.2


def test_the_probe_runs_once_per_model_and_leaves_the_generator_alone():
    model = tiny_model(max_position_embeddings=128)
    state = torch.random.get_rng_state()
    gates = induction_gates(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert induction_gates(model) is gates
    assert gates.shape == (3, 2)
    assert ((gates >= 0) & (gates <= 1)).all()
    assert len(set(gates.ravel().tolist())) == 6
