"""Every option of every program is documented, and the reference lists all of them."""

import importlib
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from app.comparison.options import Options as Comparison
from app.study.options import Options as Study
from app.zoo.__main__ import Options as Zoo
from tests.processes import run_program
from tubelet import config
from tubelet.config import Config, Pair, reference
from tubelet.masks import MASKS
from tubelet.models import ENCODERS, PREDICTORS
from tubelet.probing.heads import HEADS
from tubelet.slurm.options import SlurmConfig

ROOT = Path(__file__).parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for pattern in ("app/*/train.py", "evals/*/eval.py")
    for path in sorted(ROOT.glob(pattern))
]
PROGRAMS = {name: importlib.import_module(name).Options for name in MODULES}
PROGRAMS |= {"app.study": Study, "app.zoo": Zoo, "app.comparison": Comparison, "slurm": SlurmConfig}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_option_is_documented(name):
    rows = reference.options(PROGRAMS[name])
    assert rows
    assert [row.key for row in rows if not row.text] == []


@pytest.mark.parametrize("part", [ENCODERS, PREDICTORS, HEADS, MASKS], ids=lambda part: part.kind)
def test_every_option_of_every_part_is_documented(part):
    for name, schema in reference.parts(part).items():
        missing = [row.key for row in reference.options(schema) if not row.text]
        assert missing == [], name


class Part(Config):
    """A part of it.

    Args:
        size: In pixels,
            of the height.
        rates: Of each group.
    """

    size: int = Field(8, ge=1, lt=100)
    rates: Pair = (0.0, 1.0)
    plain: bool = True
    """Documented below."""


class Derived(Part):
    size: int = 16
    kind: Literal["a", "b"] | None = None
    """Which one."""


class Whole(Config):
    part: Part = Part()
    parts: list[Derived] = []
    """Several."""
    named: dict[str, Part | None] = {}
    """By name."""
    lr: float = Field(gt=0)
    """Speed."""
    undocumented: str | None = None


def test_rows():
    rows = {row.key: row for row in reference.options(Whole)}
    assert list(rows)[:4] == ["part", "part.size", "part.rates", "part.plain"]
    assert rows["part"].section is Part
    assert rows["part"].text == "A part of it."
    assert (rows["part.size"].type, rows["part.size"].default) == ("int >= 1 < 100", 8)
    assert rows["part.size"].text == "In pixels, of the height."
    assert (rows["part.rates"].type, rows["part.rates"].default) == ("[float, float]", [0.0, 1.0])
    assert rows["part.plain"].text == "Documented below."
    assert rows["parts.<i>.size"].text == "In pixels, of the height."  # inherited
    assert rows["parts.<i>.size"].default == 16
    assert rows["parts.<i>.kind"].type == "a | b | null"
    assert rows["named.<name>.rates"].text == "Of each group."
    assert (rows["lr"].required, rows["lr"].type) == (True, "float > 0")
    assert rows["undocumented"].text == ""


def keys(node, at=""):
    """The paths of all values of a configuration, with `<i>` for the indices of lists of mappings."""
    if isinstance(node, dict):
        return {key for name, value in node.items() for key in keys(value, f"{at}.{name}" if at else name)}
    if isinstance(node, list) and any(isinstance(value, dict) for value in node):
        return {key for value in node for key in keys(value, f"{at}.<i>")}
    return {at}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/pretrain/*.yaml")), ids=lambda path: path.stem)
def test_no_option_of_a_pretraining_is_missing(path):
    raw = config.read(path)
    raw = config.merge(raw, {"folder": "x", "data": {"datasets": ["x"], "datasets_weights": None}})
    schema = PROGRAMS["app.vjepa.train"]
    known = [row.key for row in reference.options(schema, raw)]
    free = ("objective.views.", "stages.")  # mappings of any keys
    given = config.check(raw, schema, path).model_dump(mode="json")
    assert {key for key in keys(given) - set(known) if not key.startswith(free)} == set()


def test_command_line(tmp_path):
    command = ["app.main", "--fname", "salt_vitl16", "--help-config"]
    done = run_program(*command, cwd=ROOT)
    assert done.returncode == 0
    assert "\nencoder.embed_dim: int" in done.stdout
    assert "\nfolder: text  (required)\n    Run folder" in done.stdout
    done = run_program(*command, "objective.name=lejepa", cwd=ROOT)
    assert "objective.sigreg.t_max: float > 0 = 3.0" in done.stdout
