"""An evaluation asks what it says, once, whatever the batches, interruptions and shared prompts."""

import dataclasses

import numpy as np
import pytest
import torch

import kvlib
from kvlib.eval import Results, evaluate, load
from kvlib.eval.language import language_of
from kvlib.eval.run import baselines_for
from kvlib.eval.tasks import parse_tasks
from kvlib.policies import HeadTable
from kvlib.recipe import Recipe
from kvlib.testing import tiny_model

RECIPES = ["snapkv(budget=0.25, window=8)", "h2o(budget=48)"]
SMALL = {"tasks": "niah, multikey(keys=3), continuation(tokens=5)", "lengths": [200], "samples": 3, "baselines": False}


@pytest.fixture(scope="module")
def loaded():
    return load("tiny")


def said(results):
    """What was answered, without the times."""
    return {a.key: (a.answer, a.score, a.read, a.nll and round(a.nll, 4), a.kl and round(a.kl, 4)) for a in results.answers}


def test_answers_are_what_generate_gives(loaded):
    model, tokenizer = loaded
    results = evaluate(model, RECIPES, "niah", [300], 3, tokenizer=tokenizer, baselines=False, questions=["aware"])
    language = language_of(tokenizer)
    (task,) = parse_tasks("niah")
    for answer in results.answers:
        sample = task.sample(language, 300, 0, answer.sample, (0.0, 1.0))
        ids = torch.tensor([sample.context + sample.question])
        cache = kvlib.Cache(model, answer.recipe)
        settings = {"max_new_tokens": sample.tokens, "do_sample": False, "eos_token_id": None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
        assert tokenizer.decode(out[0, 300:]) == answer.answer
        assert answer.full_nbytes == cache.full_nbytes()


@torch.no_grad()
def test_agnostic_answers_come_from_a_cache_that_had_not_seen_the_question(loaded):
    model, tokenizer = loaded
    results = evaluate(model, RECIPES, "multiquery", [300], 2, tokenizer=tokenizer, baselines=False, questions=["agnostic"])
    language = language_of(tokenizer)
    (task,) = parse_tasks("multiquery")
    for answer in results.answers:
        sample = task.sample(language, 300, 0, answer.sample, (0.0, 1.0))
        cache = kvlib.Cache(model, answer.recipe)
        model(torch.tensor([sample.context]), past_key_values=cache)
        cache.finish_prefill()
        tokens = [model(torch.tensor([sample.question]), past_key_values=cache).logits[:, -1:].argmax(-1)]
        for _ in range(sample.tokens - 1):
            tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
        assert tokenizer.decode(torch.cat(tokens, 1)[0]) == answer.answer


@torch.no_grad()
def test_a_continuation_is_measured_against_the_full_cache(loaded):
    model, tokenizer = loaded
    recipe = "streaming_llm(recent=8)"
    results = evaluate(model, [recipe], "continuation(tokens=6)", [150], 1, tokenizer=tokenizer, baselines=True)
    (task,) = parse_tasks("continuation(tokens=6)")
    sample = task.sample(language_of(tokenizer), 150, 0, 0, (0.0, 1.0))
    predicted = {}
    for name in ("full", recipe):
        cache, steps = kvlib.Cache(model, name), []
        model(torch.tensor([sample.context]), past_key_values=cache)
        for token in sample.question[:-1]:
            steps.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].double().log_softmax(-1))
        predicted[name] = torch.stack(steps)
    full, streaming = predicted.values()
    follow = torch.tensor(sample.question[1:])
    by_name = {a.recipe: a for a in results.answers}
    assert set(by_name) == {"full", recipe}
    got = by_name[recipe]
    assert got.nll == pytest.approx(-streaming[range(6), follow].mean().item(), abs=1e-4)
    forward, backward = ((p.exp() * (p - q)).sum(-1).mean().item() for p, q in ((full, streaming), (streaming, full)))
    assert got.kl == pytest.approx(forward, rel=1e-3)
    assert backward != pytest.approx(forward, rel=1e-2)
    assert got.agreement == pytest.approx((full.argmax(-1) == streaming.argmax(-1)).double().mean().item(), abs=1e-6)
    assert by_name["full"].kl == 0 and by_name["full"].agreement == 1


def test_batches_do_not_matter(loaded):
    model, tokenizer = loaded
    each = evaluate(model, RECIPES, tokenizer=tokenizer, batch=1, **SMALL)
    assert said(each) == said(evaluate(model, RECIPES, tokenizer=tokenizer, batch=3, **SMALL))


def test_questions_of_one_batch_may_differ_in_length(loaded):
    model, tokenizer = loaded
    language = language_of(tokenizer)
    plain = type(language).ask

    def longer(self, names, numbers):
        question = plain(self, names, numbers)
        extra = int(numbers[0][:2]) % 5
        return type(question)("bagi " * extra + question.text, "", question.answer, question.references)

    type(language).ask = longer
    try:
        each = evaluate(model, ["full", *RECIPES], tokenizer=tokenizer, batch=1, **{**SMALL, "samples": 6})
        rows = evaluate(model, ["full", *RECIPES], tokenizer=tokenizer, batch=6, **{**SMALL, "samples": 6})
    finally:
        type(language).ask = plain
    assert said(each) == said(rows)


def test_sliding_layers_see_no_padding():
    """Their stock cache counts columns: padding between context and question would push tokens out of the window."""
    model, (_, tokenizer) = tiny_model("Gemma2", vocab_size=1024), load("tiny")
    each = evaluate(model, ["full", "snapkv(budget=40)"], tokenizer=tokenizer, batch=1, **SMALL)
    assert said(each) == said(evaluate(model, ["full", "snapkv(budget=40)"], tokenizer=tokenizer, batch=3, **SMALL))
    held = {cell.recipe: cell.held for cell in each.cells() if cell.task == "niah"}
    assert held["snapkv(budget=40)"] < 0.6 < 1 < held["full"] < 1.5  # of what kvlib keeps, stock layers left out
    assert model.config._attn_implementation != "kvlib"  # left as it was found


def test_an_answer_ends_where_the_model_ends_it(loaded):
    model, tokenizer = loaded
    fixed = {"tokenizer": tokenizer, "baselines": False, "questions": ["aware"]}
    plain = evaluate(model, ["full"], "multiquery", [200], 2, **fixed)
    model.generation_config.eos_token_id = [5, tokenizer.convert_tokens_to_ids(plain.answers[0].answer.split()[1])]
    try:
        ended = evaluate(model, ["full"], "multiquery", [200], 1, **fixed)
    finally:
        model.generation_config.eos_token_id = None
    assert ended.answers[0].answer == plain.answers[0].answer.split()[0]
    assert plain.answers[0].score == 1 and ended.answers[0].score == 0


def test_what_is_not_a_number_is_not_called_exact(loaded):
    model, tokenizer = load("tiny")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    results = evaluate(model, ["full"], "continuation(tokens=2)", [100], 1, tokenizer=tokenizer, baselines=False)
    assert results.answers[0].kl != results.answers[0].kl


def test_what_is_given_twice_is_asked_once(loaded):
    model, tokenizer = loaded
    twice = {"questions": ["aware", "aware"], "baselines": False, "tokenizer": tokenizer}
    recipes = ["oracle(budget=1)", "oracle(budget=1.0)", "oracle(budget=1)"]
    results = evaluate(model, recipes, "niah, niah", [100, 100], 2, **twice)
    assert sorted(a.key for a in results.answers) == sorted(
        (f"oracle(budget={b})", "niah", 100, "aware", i) for b in ("1", "1.0") for i in (0, 1)
    )


def test_a_method_that_was_edited_is_not_taken_for_its_old_self(loaded, tmp_path):
    model, tokenizer = loaded
    gates = HeadTable(np.array([[0.1, 0.2], [0.9, 0.8], [0.3, 0.4], [0.5, 0.6]]), "by hand")
    gates.save(tmp_path / "heads.tsv")
    recipe = f"duo_attention(heads='{tmp_path}/heads.tsv', sink=4, recent=20)"
    asked = {"tokenizer": tokenizer, "out": tmp_path, "baselines": False}
    evaluate(model, [recipe], "niah", [100], 1, **asked)
    HeadTable(1 - gates.gates, "by hand").save(tmp_path / "heads.tsv")
    with pytest.raises(ValueError, match="has changed since it answered"):
        evaluate(model, [recipe], "niah", [100], 2, **asked)


def test_samples_that_would_be_others_now_are_not_mixed(loaded, tmp_path):
    model, tokenizer = loaded
    asked = {"tokenizer": tokenizer, "out": tmp_path, "baselines": False}
    results = evaluate(model, ["full"], "niah", [100], 1, **asked)
    results.answers[0] = dataclasses.replace(results.answers[0], prompt="00000000")
    results.save(tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match="sample 0 of niah at 100 is not the one that was answered"):
        evaluate(model, ["full"], "niah", [100], 2, **asked)


def test_recipes_that_read_prompts_in_their_own_way_are_asked_too(loaded):
    model, tokenizer = loaded
    own = "streaming_llm(sink=4, recent=60, exact=True)"
    results = evaluate(model, [own, "full"], tokenizer=tokenizer, **{**SMALL, "tasks": "niah, continuation(tokens=3)"})
    assert {a.recipe for a in results.answers} == {"full", "streaming_llm(recent=60, exact=True)"}
    assert all(a.score == 1 for a in results.answers if a.recipe == "full" and a.task == "niah")


def test_an_interrupted_evaluation_goes_on_and_a_larger_one_adds(loaded, tmp_path):
    model, tokenizer = loaded
    more = {"tokenizer": tokenizer, "out": tmp_path, "batch": 2}
    calls = []

    def stop(done, total, what):
        calls.append((done, total))
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, RECIPES, progress=stop, **more, **SMALL)
    begun = len(Results.load(tmp_path / "answers.jsonl").answers)
    assert 0 < begun < 30
    calls.clear()
    done = evaluate(model, RECIPES, progress=lambda *step: calls.append(step), **more, **SMALL)
    assert calls[-1][0] == calls[-1][1] == 200 * (2 * (2 * 2 + 1) * 3 - begun)
    assert said(done) == said(evaluate(model, RECIPES, tokenizer=tokenizer, **SMALL))
    larger = evaluate(model, [*RECIPES, "full"], **more, **{**SMALL, "samples": 4})
    assert len(larger.answers) == len({a.key for a in larger.answers}) == 3 * (2 * 2 + 1) * 4
    assert said(Results.load(tmp_path / "answers.jsonl")) == said(larger)
    calls.clear()
    evaluate(model, RECIPES, progress=lambda *step: calls.append(step), **more, **SMALL)
    assert calls == []
    with pytest.raises(ValueError, match="seed=0, this is seed=1"):
        evaluate(model, RECIPES, **more, **SMALL, seed=1)


def test_baselines_stand_at_every_budget():
    texts = "h2o(budget=0.25)", "snapkv(budget=0.25)", "oracle(budget=20)", "h2o(budget=1.0)", "oracle(budget=2)"
    assert [str(recipe) for recipe in baselines_for([Recipe.parse(text) for text in texts], 1000)] == [
        "full",
        "oracle(budget=0.25)",
        "streaming_llm(recent=246)",
        "random(budget=0.25)",
        "oracle(budget=20)",
        "streaming_llm(sink=2, recent=18)",
        "random(budget=20)",
        "oracle(budget=2)",
        "streaming_llm(sink=0, recent=2)",
    ]
    assert [str(recipe) for recipe in baselines_for([Recipe.parse("duo_attention")], 1000)] == ["full"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 0}, "samples=0: give 1 or more"),
        ({"lengths": []}, "give prompt lengths"),
        ({"questions": ["blind"]}, "give 'aware', 'agnostic' or both"),
        ({"depths": (0.5, 0.2)}, "the lower one first"),
        ({"lengths": [20]}, "give lengths of 24 or more"),
        ({"batch": 0}, "batch=0: give 1 or more"),
        ({"tasks": []}, "tasks are missing"),
        ({"recipes": ["full", "duo_attention(heads=nope.tsv)"]}, "no such file"),
        ({"lengths": [40000]}, "positions: give 32765 or less"),
        ({"tokenizer": None}, "needs its tokenizer"),
        ({"text": "bagi"}, "leave the text out"),
        ({"recipes": ["h2o(budget=2)"]}, "at least 4"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(loaded, change, words, tmp_path):
    model, tokenizer = loaded
    arguments = {"model": model, "recipes": RECIPES, "tokenizer": tokenizer, **SMALL, **change}
    with pytest.raises(ValueError, match=words):
        evaluate(**arguments, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_unknown_models_and_types_are_refused():
    with pytest.raises(ValueError, match="no such folder; give 'smollm2', 'tiny'"):
        evaluate("no/such", ["full"])
    with pytest.raises(ValueError, match="dtype=int3"):
        load("tiny", "int3")
