"""The tiny model's training script: documents that are true, runs that repeat, and a model that transformers can load."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kvlib.eval.grammar import (
    ALL,
    ASK,
    BOS,
    COLON,
    COMMA,
    COPY,
    DOT,
    EVAL,
    KEY,
    LIST,
    NAMES,
    NL,
    NUMBERS,
    PASTE,
    SET,
    TRACE,
    WORDS,
)
from kvlib.eval.language import Synthetic
from kvlib.eval.tasks import Niah

SCRIPTS = Path(__file__).parents[1] / "bench" / "tiny"
SHIPPED = Path(__file__).parent / "data" / "tiny_retriever"
sys.path.insert(0, str(SCRIPTS))
circuit, documents, presets, saving, train = map(import_module, ("circuit", "documents", "presets", "saving", "train"))

PHASE = presets.PRESETS["short"].phases[0]
TINY = presets.Preset(
    (replace(PHASE, stages=((64, 2, 2), (96, 1, 2)), warmup=2), replace(PHASE, stages=((64, 2, 2),), warmup=1, end=0.1)),
    circuit.Shape(hidden=200, intermediate=32, layers=2),
    procs=1,
)


def some_documents():
    rng = np.random.default_rng(0)
    for length in (64, 200, 517, 1024):
        for density in (0.0, 0.1, 0.5, 0.95):
            yield from (documents.document(rng, length, density) for _ in range(5))
        yield from (documents.sample(rng, length) for _ in range(10))


def runs(document):
    """(loss class, question word, tokens) of each longest run of one class."""
    found = []
    for token, *label in zip(document.ids, document.losses, document.questions, strict=True):
        if not found or found[-1][0] != label:
            found.append((label, []))
        found[-1][1].append(token)
    return [(loss, question, tokens) for (loss, question), tokens in found]


class Reader:
    """Reads what a document states, and answers its questions from nothing else."""

    def __init__(self, document):
        self.needles, self.variables, self.passages, self.asked = {}, {}, [], []
        unread = document.ids[1:]
        while unread:
            size = unread.index(DOT) + 1 if DOT in unread else len(unread)
            sentence, unread = unread[:size], unread[size:]
            self.read([token for token in sentence if token != NL])

    def read(self, sentence):
        if sentence[0] == KEY:
            self.needles.setdefault(sentence[1], []).append(sentence[2:-1])
        elif sentence[0] == SET:
            self.variables[sentence[1]] = sentence[2:-1]
        elif sentence[0] == COPY:
            self.passages.append(sentence[1:-1])
        elif sentence[0] in documents.QUESTIONS:
            self.asked.append(sentence)

    def chain(self, name):
        """The names and the value that follow a variable."""
        following = self.variables[name]
        return [following] if len(following) == 2 else [following, *self.chain(following[0])]

    def answers(self, question):
        """Every answer that would be right."""
        word, *names = question
        if word == ASK:
            return [[*self.needles[names[0]][0], DOT]] if len(self.needles[names[0]]) == 1 else []
        if word == LIST:
            values = [(name, self.needles[name]) for name in names[:-1]]
            assert names[-1] == COLON
            return [[token for name, (value,) in values for token in (name, *value)] + [DOT]]
        if word == ALL:
            first, *others = self.needles[names[0]]
            return [[*first, *(token for value in others for token in (COMMA, *value)), DOT]]
        if word == TRACE:
            return [[token for link in self.chain(names[0]) for token in link] + [DOT]]
        if word == EVAL:
            return [[*self.chain(names[0])[-1], DOT]]
        return [[*words[2:], DOT] for words in self.passages if words[:2] == names]


def test_documents_have_exactly_the_tokens_asked_for():
    rng = np.random.default_rng(1)
    for length in (1, 2, 3, 8, 17, 30):
        for _ in range(20):
            made = documents.document(rng, length, 0.95)
            assert len(made.ids) == len(made.losses) == len(made.questions) == length + 1
    for made in some_documents():
        assert (len(made.ids) - 1) in (64, 200, 517, 1024)
        assert made.ids[0] == BOS and BOS not in made.ids[1:]


def test_every_answer_follows_from_its_document():
    seen = dict.fromkeys(documents.QUESTIONS, 0)
    for made in some_documents():
        reader, found = Reader(made), 0
        for (_, _, before), (loss, question, answer) in pairwise(runs(made)):
            if loss != documents.ANSWER:
                continue
            start = max(i for i, token in enumerate(before) if token in documents.QUESTIONS)
            asked = before[start:]
            assert asked[0] == question
            assert answer in reader.answers(asked), (asked, answer)
            assert [*asked, *answer] in reader.asked
            seen[question] += 1
            found += 1
        assert found == len(reader.asked)  # nothing is asked whose answer carries no loss
    assert min(seen.values()) > 20


def test_only_filler_counts_as_text():
    filler = {*WORDS, DOT, NL}
    for made in some_documents():
        for loss, question, tokens in runs(made):
            assert loss == documents.ANSWER or question == 0
            if loss == documents.TEXT:
                assert filler.issuperset(tokens)
            if loss == documents.ANSWER:
                assert {*NAMES, *NUMBERS, *WORDS, COMMA, DOT}.issuperset(tokens)
                assert question in documents.QUESTIONS
            if loss == documents.NONE and len(tokens) > 1:
                assert {KEY, SET, COPY, ASK, LIST, ALL, TRACE, EVAL, PASTE} & {*tokens}


SIZE = {"length": 64, "documents": 3, "text_share": 0.3}


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "at", "questions"))


def test_a_batch_depends_on_seed_epoch_rank_and_step_alone():
    wanted = documents.batch(1, 2, 3, 4, **SIZE)
    for other in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)):
        assert not same(wanted, documents.batch(*other, **SIZE))
    np.random.default_rng(5).random(100)
    assert same(wanted, documents.batch(1, 2, 3, 4, **SIZE))


def test_no_two_steps_or_processes_learn_the_same():
    steps = presets.schedule(TINY.phases)
    made = [train.make(replace(TINY, seed=seed), rank, step) for seed in (0, 1) for rank in (0, 1) for step in steps]
    assert len(steps) == 6
    assert len({one.ids[0, :65].tobytes() for one in made}) == 2 * 2 * 6


def test_helpers_make_the_same_batches_in_order():
    make = partial(documents.batch, 0, 0, 0, **SIZE)
    wanted = list(documents.ahead(make, range(7), workers=0))
    found = list(documents.ahead(make, range(7), workers=1))
    assert len(found) == 7
    assert all(map(same, wanted, found))


def test_a_batch_learns_all_answers_and_a_share_of_the_text():
    made = documents.batch(0, 0, 0, 0, length=512, documents=20, text_share=0.25)
    assert made.ids.shape == (20, 513)
    rng = np.random.default_rng([0, 0, 0, 0])
    losses = np.array([documents.sample(rng, 512).losses[1:] for _ in range(20)]).ravel()
    assert np.array_equal(losses[made.at] == documents.ANSWER, made.questions > 0)
    assert (made.questions > 0).sum() == (losses == documents.ANSWER).sum()
    assert not (losses[made.at] == documents.NONE).any()
    assert (made.questions == 0).sum() / (losses == documents.TEXT).sum() == pytest.approx(0.25, abs=0.02)


def test_the_short_preset_is_the_shape_that_is_shipped():
    shape = presets.PRESETS["short"].shape
    ours, theirs = circuit.build(shape, 0).config.to_dict(), json.loads((SHIPPED / "config.json").read_text())
    for name in theirs.keys() - {"transformers_version", "dtype", "architectures"}:
        assert ours[name] == theirs[name], name


def test_no_shape_is_too_small_for_the_circuit():
    for small in ({"hidden": 192}, {"layers": 1}, {"kv_heads": 1}, {"heads": 2}):
        with pytest.raises(ValueError, match="no room for the circuit"):
            replace(circuit.Shape(), **small)


@torch.no_grad()
@pytest.mark.parametrize("preset", presets.PRESETS)
def test_the_circuit_finds_the_answer_untrained(preset):
    shape = presets.PRESETS[preset].shape
    model = circuit.build(shape, 0).eval()
    model.set_attn_implementation("eager")
    tokenizer = saving.tokenizer()
    samples = [Niah().sample(Synthetic(tokenizer), 256, 0, i, (0.1, 0.8)) for i in range(8)]
    answers = [tokenizer(sample.references[0]).input_ids for sample in samples]
    ids = torch.tensor([[*s.context, *s.question, a[0]] for s, a in zip(samples, answers, strict=True)])
    first, second, *_ = model(ids, output_attentions=True).attentions
    for head, offset in ((0, 1), (1, 2)):
        assert first[:, head].diagonal(-offset, 1, 2).mean() > 0.6
    stated = torch.tensor([row.index(row[-2]) for row in ids.tolist()])
    uniform, rows, group = 1 / 256, torch.arange(8), shape.heads // shape.kv_heads
    assert second[rows, 0, -2, stated + 1].mean() > 10 * uniform  # after `ask K`: the first number
    assert second[rows, group, -1, stated + 2].mean() > 10 * uniform  # after that number: the second


@pytest.mark.parametrize("length", [50, 256, 300])
def test_blocked_attention_is_sdpa(length):
    model = circuit.build(TINY.shape, 0)
    ids = torch.randint(0, 1024, (2, length))
    found = []
    for name in (circuit.BLOCKED, "sdpa"):
        model.set_attn_implementation(name)
        logits = model(ids, use_cache=False).logits
        model.zero_grad()
        logits.square().mean().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_a_handful_of_steps_teaches():
    phase = replace(PHASE, stages=((128, 8, 8),), warmup=1)
    preset = replace(TINY, phases=(phase,), shape=replace(TINY.shape, layers=3))
    learner, losses = train.Learner(preset), []
    for step in presets.schedule(preset.phases):
        learner.averages.clear()
        learner.learn(step, train.make(preset, 0, step))
        losses.append(learner.averages["answer loss"])
    assert np.isfinite(losses).all()
    assert np.mean(losses[-2:]) < 0.8 * losses[0]
    assert all(p.isfinite().all() for p in learner.parameters)


def test_a_step_takes_the_rates_and_the_weight_of_its_phase():
    phases = [replace(PHASE, stages=((128, 4, 4),), warmup=4, text_weight=weight) for weight in (0.0, 0.0, 1.0)]
    learners = [train.Learner(replace(TINY, phases=(phase,))) for phase in phases]
    answers, both = (documents.batch(0, 0, 0, 0, length=128, documents=4, text_share=share) for share in (0.0, 1.0))
    for learner, made in zip(learners, (answers, both, both), strict=True):
        learner.learn(presets.Step(0, 1, 128, 4), made)
        rates = [group["lr"] for optimiser in learner.optimisers for group in optimiser.param_groups]
        assert rates == [TINY.matrix_rate / 2, TINY.rate / 2]
    weights = [torch.cat([p.detach().flatten() for p in learner.parameters]) for learner in learners]
    without, unweighted, weighted = weights
    assert (without - unweighted).norm() < 0.2 * (without - weighted).norm()


def test_gradients_are_averaged_over_the_processes(monkeypatch):
    alone, several = train.Learner(TINY), train.Learner(replace(TINY, procs=2))
    monkeypatch.setattr(train.dist, "all_reduce", lambda flat: flat.mul_(2))  # the other process found the same
    step, *_ = presets.schedule(TINY.phases)
    for learner in (alone, several):
        learner.learn(step, train.make(TINY, 0, step))
    assert all(map(torch.equal, alone.parameters, several.parameters))


def final(out):
    return torch.load(out / "checkpoint-000006" / "state.pt", weights_only=True)["learner"]


def assert_identical(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_identical(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_an_interrupted_run_gives_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train.train(TINY, straight)
    make = train.make

    def interrupted(preset, rank, step):
        if (step.epoch, step.index) == (1, 0):  # the fifth step
            raise KeyboardInterrupt
        return make(preset, rank, step)

    monkeypatch.setattr(train, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(TINY, broken, save_every=3)
    monkeypatch.setattr(train, "make", make)
    assert [folder.name for folder in saving.checkpoints(broken)] == ["checkpoint-000003"]
    assert len((broken / "log.jsonl").read_text().splitlines()) == 2
    assert train.train(TINY, broken, save_every=3)
    assert [folder.name for folder in saving.checkpoints(broken)] == ["checkpoint-000006"]
    assert_identical(final(straight), final(broken))
    for name in ("model.safetensors", "config.json"):
        assert (straight / "model" / name).read_bytes() == (broken / "model" / name).read_bytes()
    lines = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (straight, broken)]
    assert [line["step"] for line in lines[0]] == [2, 4, 6]
    assert [line["tokens"] for line in lines[0]] == [256, 448, 704]
    for one, other in zip(*lines, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert train.train(TINY, broken)  # nothing is left to do
    assert_identical(final(straight), final(broken))


def test_time_that_runs_out_leaves_a_checkpoint(tmp_path):
    assert not train.train(TINY, tmp_path, minutes=0)
    assert not train.train(TINY, tmp_path, minutes=0)
    assert [folder.name for folder in saving.checkpoints(tmp_path)] == ["checkpoint-000002"]
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_that_is_cut_short_does_not_count(tmp_path, monkeypatch):
    saving.write_checkpoint(tmp_path, TINY, 1, {"done": 1})

    def full(state, path):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving.torch, "save", full)
        with pytest.raises(OSError, match="no space"):
            saving.write_checkpoint(tmp_path, TINY, 2, {"done": 2})
    assert saving.last_checkpoint(tmp_path, TINY).name == "checkpoint-000001"
    saving.write_checkpoint(tmp_path, TINY, 3, {"done": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000003"]
    assert torch.load(tmp_path / "checkpoint-000003" / "state.pt") == {"done": 3}


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, capsys):
    saving.write_checkpoint(tmp_path, presets.PRESETS["short"], 5, {})
    assert saving.last_checkpoint(tmp_path, presets.PRESETS["short"]).name == "checkpoint-000005"
    for arguments, message in (
        (["--seed", "3"], "seed=0, and this run has seed=3"),
        (["--procs", "1"], "procs=2, and this run has procs=1"),
        (["--stages", "256x16:300,512x8:9/64x1:3"], "phases.0.stages.1.2=808, and this run has phases.0.stages.1.2=9"),
        (["--preset", "long"], "device=cpu, and this run has device=cuda"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--out", str(tmp_path), *arguments])
        said = capsys.readouterr().err
        assert message in said and "give the options it was made with" in said and "another folder" in said
    with pytest.raises(ValueError, match="was made with rate"):
        train.train(replace(presets.PRESETS["short"], rate=1.0), tmp_path)


def test_stages_are_read_and_refused():
    short = presets.PRESETS["short"].phases
    assert presets.staged(short, "64x2:3,128x1:4/256x1:5") == (
        replace(short[0], stages=((64, 2, 3), (128, 1, 4))),
        replace(short[1], stages=((256, 1, 5),)),
    )
    for wrong in ("64x2:3", "64x2:3/", "64x0:3/64x2:3", "64:3/64x2:3", "64x2:3;64x2:3/64x2:3", "1x1:1/1x1:1/1x1:1"):
        with pytest.raises(ValueError, match="should be LENGTHxDOCUMENTS:STEPS"):
            presets.staged(short, wrong)


def test_the_rate_rises_and_falls_within_a_phase():
    phase = replace(PHASE, stages=((64, 1, 60), (128, 1, 40)), warmup=10, end=0.2)
    rates = [phase.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert rates[50] == pytest.approx(0.6)
    assert rates[99] == pytest.approx(0.2, abs=0.001)
    assert [replace(phase, end=1.0).rate(step) for step in (9, 50, 99)] == [1, 1, 1]


def test_the_tokenizer_is_the_shipped_one(tmp_path):
    saving.tokenizer().save_pretrained(tmp_path)
    names = sorted(path.name for path in SHIPPED.glob("tokenizer*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert json.loads((tmp_path / name).read_text()) == json.loads((SHIPPED / name).read_text())


def test_the_command_trains_in_two_processes(tmp_path):
    command = [sys.executable, SCRIPTS / "train.py", "--out", tmp_path / "run", "--stages", "64x1:1/64x1:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wrote" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert isinstance(model, LlamaForCausalLM) and model.dtype == torch.float16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer("<bos> ask Kela").input_ids[:2] == [BOS, ASK]
    kept = torch.load(tmp_path / "run" / "checkpoint-000002" / "state.pt", weights_only=True)["learner"]["model"]
    assert kept["model.norm.weight"].dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, kept[name].half()), name
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in log] == [(2, 256)]
