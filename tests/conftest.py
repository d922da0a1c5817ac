"""Shared fixtures: deterministic torch, no hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():  # before anything imports Triton: kernels then run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

settings.register_profile("kvlib", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("kvlib")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
