"""Reset torch.compile after each test: models share methods, and torch recompiles each only a few times."""

import sys

import pytest


@pytest.fixture(autouse=True)
def reset_compiler():
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
