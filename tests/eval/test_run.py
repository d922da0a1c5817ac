"""An evaluation asks what it says, once, whatever the batches, interruptions and shared prompts."""

import pytest
import torch

import kvlib
from kvlib.eval import Results, evaluate, load
from kvlib.eval.language import language_of
from kvlib.eval.run import baselines_for
from kvlib.eval.tasks import parse_tasks
from kvlib.recipe import Recipe

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
    recipe = "streaming_llm(sink=4, recent=40)"
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
    assert set(by_name) == {"full", "streaming_llm(recent=40)"}
    got = by_name["streaming_llm(recent=40)"]
    assert got.nll == pytest.approx(-streaming[range(6), follow].mean().item(), abs=1e-4)
    assert got.kl == pytest.approx((full.exp() * (full - streaming)).sum(-1).mean().item(), abs=1e-4)
    assert got.kl > 1e-4
    assert got.agreement == pytest.approx((full.argmax(-1) == streaming.argmax(-1)).double().mean().item(), abs=1e-6)
    assert by_name["full"].kl == 0 and by_name["full"].agreement == 1


def test_batches_do_not_matter(loaded):
    model, tokenizer = loaded
    each = evaluate(model, RECIPES, tokenizer=tokenizer, batch=1, **SMALL)
    assert said(each) == said(evaluate(model, RECIPES, tokenizer=tokenizer, batch=3, **SMALL))


def test_rows_of_different_lengths_are_padded_apart():
    """Questions of one batch need not have the same number of tokens."""
    _, tokenizer = load("tiny")
    model = load("tiny")[0]
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
    recipes = [
        Recipe.parse(text) for text in ("h2o(budget=0.25)", "snapkv(budget=0.25)", "oracle(budget=20)", "h2o(budget=1.0)")
    ]
    assert [str(recipe) for recipe in baselines_for(recipes, 1000)] == [
        "full",
        "oracle(budget=0.25)",
        "random(budget=0.25)",
        "streaming_llm(recent=246)",
        "oracle(budget=20)",
        "random(budget=20)",
        "streaming_llm(sink=2, recent=18)",
    ]
    assert [str(recipe) for recipe in baselines_for([Recipe.parse("duo_attention")], 1000)] == ["full"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 0}, "samples=0: give 1 or more"),
        ({"lengths": []}, "give prompt lengths"),
        ({"questions": ["blind"]}, "give 'aware', 'agnostic' or both"),
        ({"depths": (0.5, 0.2)}, "the lower one first"),
        ({"lengths": [20]}, "give"),
        ({"lengths": [40000]}, "positions: give less"),
        ({"tokenizer": None}, "needs its tokenizer"),
        ({"text": "bagi"}, "leave the text out"),
        ({"recipes": ["h2o(budget=2)"]}, "at least 4"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(loaded, change, words):
    model, tokenizer = loaded
    arguments = {"model": model, "recipes": RECIPES, "tokenizer": tokenizer, **SMALL, **change}
    with pytest.raises(ValueError, match=words):
        evaluate(**arguments)


def test_unknown_models_and_types_are_refused():
    with pytest.raises(ValueError, match="no such folder; give 'smollm2', 'tiny'"):
        evaluate("no/such", ["full"])
    with pytest.raises(ValueError, match="dtype=int3"):
        load("tiny", "int3")
