"""The claims about a real model; needs the weights that `make full` installs."""

import time

import pytest
import torch
from transformers import DynamicCache

import kvlib
from kvlib.eval import evaluate, load
from kvlib.eval.language import default_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return load("smollm2", "float32")


@pytest.fixture(scope="module")
def prompt(model_and_tokenizer):
    return model_and_tokenizer[1](default_text(), return_tensors="pt").input_ids[:, :2048]


@pytest.mark.parametrize("recipe", ["h2o(budget=0.25)", "h2o_prefill(budget=0.25)", "snapkv(budget=0.25)"])
@torch.no_grad()
def test_a_quarter_of_the_tokens_takes_about_a_quarter_of_the_bytes(model_and_tokenizer, prompt, recipe):
    model, _ = model_and_tokenizer
    cache = kvlib.Cache(model, recipe)
    token = model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    model(token, past_key_values=cache)
    assert cache.nbytes()["device"] <= 0.35 * cache.full_nbytes()


@torch.no_grad()
def test_a_full_step_is_no_slower_than_the_stock_cache(model_and_tokenizer, prompt):
    model, _ = model_and_tokenizer
    caches = {"kvlib": kvlib.Cache(model, "full"), "sdpa": DynamicCache(config=model.config)}
    tokens, ratios = {}, []
    for name, cache in caches.items():
        model.set_attn_implementation(name)
        tokens[name] = model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    for _ in range(31):
        took = {}
        for name, cache in caches.items():
            model.set_attn_implementation(name)
            began = time.perf_counter()
            tokens[name] = model(tokens[name], past_key_values=cache).logits.argmax(-1)
            took[name] = time.perf_counter() - began
        ratios.append(took["kvlib"] / took["sdpa"])
    assert torch.equal(tokens["kvlib"], tokens["sdpa"])
    assert sorted(ratios)[15] <= 1.05  # 1.0 and the noise of a shared machine


def test_real_text_full_and_duo_attention_answer_streaming_does_not(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    recipes = ["full", "duo_attention", "streaming_llm(recent=60)"]
    fixed = {"baselines": False, "questions": ["aware"], "depths": (0.05, 0.85), "batch": 4}
    results = evaluate(model, recipes, "niah, continuation(tokens=16)", [1024], 4, tokenizer=tokenizer, **fixed)
    needle = {cell.recipe: cell for cell in results.cells() if cell.task == "niah"}
    assert needle["full"].value == 1
    assert needle["duo_attention"].value >= 0.75
    assert needle["streaming_llm(recent=60)"].value == 0
    assert needle["duo_attention"].held < 0.75 * needle["full"].held
    text = {cell.recipe: cell for cell in results.cells() if cell.task != "niah"}
    assert text["full"].kl == 0
    assert text["duo_attention"].kl < text["streaming_llm(recent=60)"].kl
    assert text["full"].value < 40  # perplexity of a model that reads English


def test_real_text_selectors_answer_from_a_quarter_on_either_tier(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    methods = ["quest(budget=0.25)", "clusterkv(budget=0.25)", "duo_attention(sparsity=0.3) + tokenselect(budget=0.25)"]
    recipes = ["full", *methods, *(method + " @ host" for method in methods)]
    fixed = {"baselines": False, "questions": ["agnostic"], "depths": (0.05, 0.85), "batch": 4}
    results = evaluate(model, recipes, "niah", [1024], 4, tokenizer=tokenizer, **fixed)
    found = {cell.recipe: cell.value for cell in results.cells()}
    assert found["full"] == 1
    said = {(answer.recipe, answer.sample): answer.answer for answer in results.answers}
    for recipe in map(str, map(kvlib.Recipe.parse, methods)):
        assert found[recipe] >= 0.75
        assert all(said[recipe, i] == said[recipe + " @ host", i] for i in range(4))
