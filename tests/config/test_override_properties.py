"""Files with bases and overrides of generated keys and values, against assignment in nested dictionaries."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import bounded
from tubelet import config
from tubelet.config import ConfigError

KEYS = st.sampled_from("xyz")
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("é:, #=[{'\"1e-3", max_size=5)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
FILES = st.dictionaries(KEYS, VALUES, max_size=3)
PATHS = st.lists(st.sampled_from(["x", "y", "z", "0", "1"]), min_size=1, max_size=4).map(lambda keys: ["x", *keys])


def merged(base, over):
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {key: merged(base[key], over[key]) if key in base and key in over else {**base, **over}[key]
            for key in {**base, **over}}  # fmt: skip


def assigned(node, keys, value):
    """Return `node` with `value` at the path; LookupError where there is no such place."""
    if not keys:
        return copy.deepcopy(value)
    if isinstance(node, list):
        if not keys[0].isdigit():
            raise LookupError
        return [*node[: int(keys[0])], assigned(node[int(keys[0])], keys[1:], value), *node[int(keys[0]) + 1 :]]
    if isinstance(node, dict) or node is None:
        return {**(node or {}), keys[0]: assigned((node or {}).get(keys[0]), keys[1:], value)}
    raise LookupError


@bounded(80)
@given(base=FILES, over=FILES, changes=st.lists(st.tuples(PATHS, VALUES), max_size=4))
def test_overrides_are_assignments(tmp_path, base, over, changes):
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    (tmp_path / "over.yaml").write_text(json.dumps({"base": "base.yaml", **over}))
    overrides = [f"{'.'.join(keys)}={json.dumps(value)}" for keys, value in changes]
    expected = merged(base, over)
    try:
        for keys, value in changes:
            expected = assigned(expected, keys, value)
    except LookupError:
        with pytest.raises(ConfigError, match="has no key below it|is no index of a list"):
            config.read(tmp_path / "over.yaml", overrides)
        return
    assert config.read(tmp_path / "over.yaml", overrides) == expected


@bounded(80)
@given(text=st.text(st.characters(max_codepoint=0x2FF) | st.sampled_from("\n:-[]{}&*!<#'\"|>%@0 1"), max_size=20))
def test_any_text_is_a_configuration_or_a_message(tmp_path, text):
    (tmp_path / "any.yaml").write_text(text, encoding="utf-8")
    for overrides in ([], [text], [f"x={text}"], [f"{text}=1"]):
        try:
            config.read(tmp_path / "any.yaml", overrides)
        except ConfigError as error:
            message = str(error)
        else:
            continue
        assert "any.yaml" in message or (overrides and overrides[0] in message)
