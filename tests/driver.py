"""Feed a head group hand-made attention probabilities."""

import numpy as np
import torch

from kvlib import census
from kvlib.group import HeadGroup
from kvlib.recipe import Recipe
from kvlib.segment import Spec

SIZE = 64  # keys are unit vectors, so a query is the list of its logits


def group_for(recipe):
    recipe = Recipe.parse(recipe)
    return HeadGroup(recipe.evict, recipe.sizes)


def keys(first, n):
    """Keys and values of positions first..first + n - 1: k, v [1, 1, n, SIZE]."""
    k = torch.eye(SIZE)[first : first + n].view(1, 1, n, SIZE)
    return k, k.clone()


def query(probabilities, positions=None):
    """A query that attends as told (probabilities over positions), whatever else it sees being far below."""
    positions = range(len(probabilities)) if positions is None else positions
    q = torch.full((SIZE,), -60.0)
    for p, at in zip(probabilities, positions, strict=True):
        q[at] = np.log(p)
    return q.view(1, 1, 1, SIZE)


def feed(group, rows, first=0, positions=None):
    """One chunk of queries with the given probabilities; returns the output, which is the probabilities themselves."""
    q = torch.cat([query(row, positions) for row in rows], 2)
    k, v = keys(first, len(rows))
    return group.forward(q, k, v, None, Spec(1.0), recording=False)


def held(group):
    return census.positions(group)[0][0].tolist()
