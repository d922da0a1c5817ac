"""The oracle reads what a full computation of attention says is read."""

import pytest
import torch

import kvlib
from kvlib.kernels.bounds import products
from kvlib.kernels.selection import top, vote
from kvlib.policies import Oracle, RecipeError
from kvlib.policies.selection import Index
from kvlib.segment import Spec
from kvlib.testing import prompts, tiny_model
from tests.driver import keys


def select(logits, budget, rest=None):
    """Which keys are read: logits [Hq, T] for one KV head and all keys."""
    logits = torch.tensor(logits)
    q, k = torch.nn.functional.pad(logits, (0, 64 - logits.shape[-1]))[None], keys(0, logits.shape[-1])[0]
    found = Oracle(budget).logits(q, Index({}, None, {}, lambda q: products(q, k)))
    assert torch.equal(found[0], logits)
    return sorted(top(vote(found, 1, rest), budget)[0, 0].tolist())


def test_heads_that_share_keys_choose_by_the_sum_of_their_probabilities():
    sharp, mild = [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 1.9]
    assert select([sharp, mild], 1) == [0]
    assert select([sharp, mild], 2) == [0, 2]


def test_ties_go_to_the_lower_position():
    assert select([[1.0, 1.0, 1.0, 1.0]], 2) == [0, 1]


def test_what_a_head_reads_in_any_case_takes_it_out_of_the_vote():
    sharp, mild = [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 1.9]
    assert select([sharp, mild], 1, rest=torch.tensor([[20.0, -20.0]])) == [2]


@torch.no_grad()
def test_a_step_attends_the_chosen_and_the_prompt_everything():
    """Against attention written out: the output of one layer under the oracle."""
    torch.manual_seed(0)
    layer = kvlib.Cache(tiny_model(), "oracle(budget=5)").managed[0].store
    q, k, v = torch.randn(1, 8, 33, 16), torch.randn(1, 2, 33, 16), torch.randn(1, 2, 33, 16)
    layer.forward(q[:, :, :32], k[:, :, :32], v[:, :, :32], None, Spec(0.25))
    out = layer.forward(q[:, :, 32:], k[:, :, 32:], v[:, :, 32:], None, Spec(0.25))
    p = (q[:, :, 32:] @ k.repeat_interleave(4, 1).transpose(2, 3) * 0.25).softmax(-1)
    best = p[..., :32].view(2, 4, 32).sum(1).topk(4).indices  # and the newest token, which is read in any case
    mask = torch.zeros(2, 33).scatter_(1, best, 1.0).index_fill_(1, torch.tensor([32]), 1.0)
    mask = mask.repeat_interleave(4, 0)[None, :, None]
    wanted = (p * mask / (p * mask).sum(-1, keepdim=True)) @ v.repeat_interleave(4, 1)
    assert torch.allclose(out, wanted, atol=1e-5)
    assert (layer.attended() == 5).all()
    assert (layer.kept() == 33).all()


@torch.no_grad()
def test_a_draft_reads_what_its_tokens_would_read_alone():
    model = tiny_model()
    ids, _ = prompts(1, 60, 0)
    alone, drafted = kvlib.Cache(model, "oracle(budget=0.2)"), kvlib.Cache(model, "oracle(budget=0.2)")
    model(ids, past_key_values=alone)
    drafted.activate_past_recording()
    model(ids, past_key_values=drafted)
    drafted.crop(0)
    single = torch.cat([model(ids[:, i : i + 1], past_key_values=alone).logits for i in range(6)], 1)
    assert torch.allclose(model(ids[:, :6], past_key_values=drafted).logits, single, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_detached_model_cannot_read_everything_in_its_stead():
    model = tiny_model()
    cache = kvlib.Cache(model, "oracle(budget=4)")
    model(prompts(1, 40, 0)[0], past_key_values=cache)
    kvlib.detach(model)
    with pytest.raises(RuntimeError, match="only kvlib's attention can read it"):
        model(torch.tensor([[5]]), past_key_values=cache)


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(RecipeError, match="h2o drops single tokens"):
        kvlib.Recipe.parse("h2o(budget=64) + oracle(budget=32)")
    with pytest.raises(RecipeError, match="reads one choice"):
        kvlib.Recipe.parse("oracle(budget=64) + oracle(budget=32)")
    with pytest.raises(RecipeError, match="budget=0"):
        kvlib.Recipe.parse("oracle(budget=0)")
    recipe = kvlib.Recipe.parse("duo_attention + oracle(budget=0.125)")
    assert kvlib.Recipe.parse(str(recipe)) == recipe
    assert not kvlib.Recipe.parse("oracle(budget=0.5)").lossy
