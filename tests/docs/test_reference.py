"""The configuration reference has all options of all programs and parts, with their documentation."""

import re

import pytest
from pydantic import Field

from tests.docs.pages import ROOT
from tools.docs import options, reference
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


def test_options_of_a_class():
    by_name = {option.name: option for option in options.options_of(Whole)}
    first, second = by_name["first"], by_name["second"]
    assert (first.kind, first.default, first.documentation) == ("integer, ≥1", "`3`", "An argument of two lines.")
    assert (second.kind, second.default, second.documentation) == ("number or null", "`null`", "Below the option.")
    assert (by_name["names"].kind, by_name["names"].default) == ("list of text", "*required*")
    paths = dict(options.sections_of(Whole))
    assert paths == {"": Whole, "section": Section, "several.<name>": Section}


def test_options_of_a_constructor_have_its_documentation():
    schema = ENCODERS.locate({"name": "vit_tiny"})[0]
    documented = {option.name: option for option in options.options_of(schema)}
    assert documented["use_rope"].documentation.startswith("Use rotary positions")
    assert documented["embed_dim"].default == "`192`"


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
        for path, section in options.sections_of(schema):
            assert not path or f"## `{path}`" in page
            assert all(f"| `{option}` |" in page for option in section.model_fields)


def test_every_part_is_in_the_reference(written):
    for part in reference.PARTS.values():
        assert all(f"`{name}`" in written["parts.md"] for name in part.available())


def test_most_options_of_pretraining_are_documented():
    sections = dict(options.sections_of(reference.program_options()["app.vjepa"]))
    documented = [bool(o.documentation) for section in sections.values() for o in options.options_of(section)]
    assert sum(documented) / len(documented) > 0.6


def test_the_navigation_has_all_pages(written):
    navigation = re.sub("#.*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {f"reference/{name}" for name in written} == set(re.findall(r"reference/\w+\.md", navigation))
