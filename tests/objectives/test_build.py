"""Modules that name themselves objectives, but build none."""

import pytest

from tubelet import objectives
from tubelet.training.objective import ObjectiveOptions


@pytest.mark.parametrize(
    ("source", "message"),
    [("", "has no function build"), ("def build(options, setup):\n    return {}\n", "build returned dict, not an")],
)
def test_module_that_builds_no_objective_is_refused(tmp_path, monkeypatch, source, message):
    name = f"builds_nothing_{len(source)}"
    (tmp_path / f"{name}.py").write_text(
        f"from tubelet.training.objective import ObjectiveOptions as Options\n{source}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        objectives.build(ObjectiveOptions(name=name), None)
