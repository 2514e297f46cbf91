"""The configuration reference has all options of all programs and parts, with their documentation."""

import re

import pytest
from pydantic import Field

from tests.docs.pages import ROOT
from tools.docs import reference
from tubelet.config import Config
from tubelet.models import ENCODERS


class Section(Config):
    """A section.

    Args:
        first: An argument
            of two lines.
    """

    first: int = Field(3, ge=1)
    second: float | None = None
    """Below the option."""


class Whole(Section):
    names: list[str] = Field(min_length=1)
    section: Section = Section()
    several: dict[str, Section] = {}


def test_rows_of_a_class():
    rows = [line.strip("| ").split(" | ") for line in reference.table(Whole)[2:-1]]
    assert rows[:3] == [
        ["`first`", "int >= 1", "`3`", "An argument of two lines."],
        ["`second`", "float \\| null", "`null`", "Below the option."],
        ["`names`", "list of text", "*required*"],
    ]
    assert dict(reference.sections_of(Whole)) == {"": Whole, "section": Section, "several.<name>": Section}


def test_options_of_a_constructor_have_its_documentation():
    rows = "\n".join(reference.table(ENCODERS.locate({"name": "vit_tiny"})[0]))
    assert "| Use rotary positions" in rows
    assert "| `embed_dim` | int > 0 | `192` |" in rows


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    names = reference.write(folder)
    assert {path.name for path in folder.iterdir()} == set(names)
    return {name: (folder / name).read_text(encoding="utf-8") for name in names}


def test_every_program_has_a_page_with_all_of_its_options(written):
    programs = {path.parent for package in ("app", "evals") for path in (ROOT / package).glob("*/__init__.py")}
    programs |= {path.parent for pattern in ("app/*/train.py", "evals/*/eval.py") for path in ROOT.glob(pattern)}
    assert {f"{program.parent.name}_{program.name}.md" for program in programs} <= set(written)
    for name, schema in reference.program_options().items():
        page = written[name.replace(".", "_") + ".md"]
        for path, section in reference.sections_of(schema):
            assert not path or f"## `{path}`" in page
            assert all(f"| `{option}` |" in page for option in section.model_fields)


def test_every_part_is_in_the_reference(written):
    for part in reference.PARTS.values():
        assert all(f"`{name}`" in written["parts.md"] for name in part.available())


def test_the_navigation_has_all_pages(written):
    navigation = re.sub("#.*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {f"reference/{name}" for name in written} == set(re.findall(r"reference/\w+\.md", navigation))
