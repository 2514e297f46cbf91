"""Compiled code is forgotten after each test: models share methods, and torch compiles each only a few times."""

import sys

import pytest


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
