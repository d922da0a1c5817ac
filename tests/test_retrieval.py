"""On a model that really retrieves: what each method keeps, loses, and learns."""

import pytest
import torch

import kvlib
from kvlib.identify import Training, identify, passkeys
from tests.retrieval import document, retriever, right


@pytest.fixture(scope="module")
def model():
    return retriever()


def test_methods_stand_in_the_expected_order(model):
    found = {
        recipe: right(model, lambda recipe=recipe: kvlib.Cache(model, recipe))
        for recipe in ("full", "snapkv(budget=0.25, window=16)", "streaming_llm(sink=4, recent=124)", "h2o(budget=0.25)")
    }
    full, snapkv, streaming, h2o = found.values()
    assert full == 16
    assert snapkv >= 12
    assert streaming == 0
    assert h2o < snapkv


def test_duo_attention_keeps_retrieval_where_the_probe_finds_the_heads(model):
    cache = kvlib.Cache(model, "duo_attention(sparsity=0.5, sink=4, recent=60)")
    assert cache.table.gates[1].min() > 0.5  # both KV heads of layer 1 hold the circuit
    assert not cache.streaming[1].any()
    assert right(model, lambda: kvlib.Cache(model, "duo_attention(sparsity=0.5, sink=4, recent=60)")) == 16
    assert right(model, lambda: kvlib.Cache(model, "duo_attention(sparsity=1.0, sink=4, recent=60)")) == 0


def test_gates_learnt_by_optimisation_find_the_same_heads(model, tmp_path):
    def examples():
        seed = 1000
        while True:
            ids, answer = document(384, depth=0.1 + 0.5 * (seed % 7) / 7, seed=seed)
            full = torch.cat([ids, torch.tensor([answer])], 1)
            labelled = torch.zeros(full.shape[1], dtype=torch.bool)
            labelled[-3:] = True
            yield full, labelled
            seed += 1

    losses = []
    training = Training(steps=100, sink=4, recent=48, rate=0.05)
    table = identify(model, examples(), training, lambda step, loss: losses.append(loss))
    others = table.gates[[0, 2, 3]]
    assert table.gates[1].min() > 0.9
    assert others.max() < 0.6
    assert losses[-1] < losses[0]
    assert all(parameter.requires_grad for parameter in model.parameters())
    table.save(tmp_path / "heads.tsv")
    recipe = f"duo_attention(sparsity=0.75, heads='{tmp_path}/heads.tsv', sink=4, recent=60)"
    assert right(model, lambda: kvlib.Cache(model, recipe)) == 16


def test_with_all_gates_open_the_student_is_the_teacher(model):
    ids, _ = document(256, 0.4, seed=1)
    labelled = torch.ones(256, dtype=torch.bool)
    losses = []
    identify(model, iter([(ids, labelled)]), Training(steps=1), lambda step, loss: losses.append(loss))
    assert losses == pytest.approx([0.05], abs=1e-6)  # the penalty of gates that are all 1


class Words:
    """The least a tokenizer must do."""

    bos_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [1 + hash(word) % 97 for word in text.split()]})


def test_passkey_examples_label_the_answers_and_need_room():
    training = Training(length=200, passkeys=2, words=5)
    ids, labelled = next(passkeys(Words(), "word " * 500, training))
    assert ids.shape == (1, 200)
    assert labelled.sum() == 2 * 5
    hidden = ids[0][labelled][:5].tolist()
    text = ids[0].tolist()
    assert sum(text[i : i + 5][:4] == hidden[:4] for i in range(200)) >= 1  # the last word carries a full stop in the text
    for bad in (Training(length=60), Training(length=900, passkeys=2)):
        with pytest.raises(ValueError, match="give a greater length"):
            next(passkeys(Words(), "word " * 500, bad))
