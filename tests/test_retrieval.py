"""On a model that really retrieves: which heads do it, and that they can be found."""

import itertools

import pytest
import torch

import kvlib
from kvlib.eval import evaluate, load, parse_tasks
from kvlib.eval.language import language_of
from kvlib.identify import Training, identify, passkeys


@pytest.fixture(scope="module")
def loaded():
    return load("tiny")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def sample(loaded):
    """The i-th needle in a prompt of some length, six others around it."""
    (task,), language = parse_tasks("multikey(keys=7)"), language_of(loaded[1])
    return lambda length, i: task.sample(language, length, 0, i, (0.05, 0.6))


def right(loaded, recipe):
    """Share of needles found at 512 tokens, the question being part of the prompt."""
    model, tokenizer = loaded
    fixed = {"baselines": False, "questions": ["aware"], "depths": (0.05, 0.6)}
    answers = evaluate(model, [recipe], "multikey(keys=7)", [512], 16, tokenizer=tokenizer, **fixed).answers
    return sum(answer.score for answer in answers) / len(answers)


def test_duo_attention_keeps_retrieval_where_the_probe_finds_the_heads(loaded, model):
    cache = kvlib.Cache(model, "duo_attention(sparsity=0.5, sink=4, recent=60)")
    assert cache.table.gates[1].min() > 0.5  # both KV heads of layer 1 hold the circuit
    assert not cache.streaming[1].any()
    assert right(loaded, "duo_attention(sparsity=0.5, sink=4, recent=60)") == 1
    assert right(loaded, "duo_attention(sparsity=1.0, sink=4, recent=60)") == 0


def test_gates_learnt_by_optimisation_find_the_same_heads(loaded, model, sample, tmp_path):
    def examples():
        for i in itertools.count(1000):
            needle = sample(384, i)
            answer = loaded[1](needle.references[0], add_special_tokens=False).input_ids
            ids = torch.tensor([needle.context + needle.question + answer])
            labelled = torch.zeros(ids.shape[1], dtype=torch.bool)
            labelled[-3:] = True
            yield ids, labelled

    losses = []
    training = Training(steps=100, sink=4, recent=48, rate=0.05)
    table = identify(model, examples(), training, lambda step, loss: losses.append(loss))
    others = table.gates[[0, 2, 3]]
    assert table.gates[1].min() > 0.9
    assert others.max() < 0.8
    assert losses[-1] < losses[0]
    assert all(parameter.requires_grad for parameter in model.parameters())
    table.save(tmp_path / "heads.tsv")
    recipe = f"duo_attention(sparsity=0.75, heads='{tmp_path}/heads.tsv', sink=4, recent=60)"
    assert right(loaded, recipe) == 1


def test_with_all_gates_open_the_student_is_the_teacher(model, sample):
    needle = sample(256, 1)
    ids = torch.tensor([needle.context + needle.question])
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
