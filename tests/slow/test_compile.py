import pytest
import torch

import kvlib
from kvlib.testing import prompts, tiny_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("recipe", ["full", "h2o(budget=32)"])
def test_compiled_with_the_default_backend_gives_the_same_tokens(recipe):
    model, (ids, _) = tiny_model(num_hidden_layers=2), prompts(1, 96, 0)
    settings = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(ids, past_key_values=kvlib.Cache(model, recipe), **settings)
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(ids, past_key_values=kvlib.Cache(model, recipe), **settings), expected)
