"""Writes docs/reference/: the options of all programs and parts, from their classes."""

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tubelet.config import Config
from tubelet.config.factories import Factory
from tubelet.config.reference import Option, as_yaml, nested, own_options
from tubelet.config.registry import Module
from tubelet.data.options import DataFormat
from tubelet.masks import MASKS
from tubelet.models import ENCODERS, PREDICTORS
from tubelet.probing.heads import HEADS
from tubelet.slurm.options import SlurmConfig

ROOT = Path(__file__).parents[2]
PACKAGES = {"app": "train", "evals": "eval"}
DATA_FORMATS = next(item for item in DataFormat.__metadata__ if isinstance(item, Module))
PARTS: dict[str, Module | Factory] = {
    "Objectives": Module("objectives"),
    "Encoders": ENCODERS,
    "Predictors": PREDICTORS,
    "Masks": MASKS,
    "Data formats": DATA_FORMATS,
    "Heads": HEADS,
}
INTRODUCTION = """# Configuration reference

These pages are generated from the options classes. Keys are those of the YAML files; on the command line they are
dotted, as in `data.batch_size=8`. See [Configuration](../configuration.md) for how files and overrides work.

"""


def program_options() -> dict[str, type[Config]]:
    """Return the options of each program, by the dotted name of its package."""
    found = {}
    for package, module in PACKAGES.items():
        for path in sorted((ROOT / package).glob(f"*/{module}.py")):
            found[f"{package}.{path.parent.name}"] = importlib.import_module(
                f"{package}.{path.parent.name}.{module}"
            ).Options
    for name, module in (
        ("app.study", "app.study.options"),
        ("app.zoo", "app.zoo.__main__"),
        ("app.comparison", "app.comparison.options"),
    ):
        found[name] = importlib.import_module(module).Options
    return dict(sorted(found.items()))


def sections_of(schema: type[Config], path: str = "") -> Iterator[tuple[str, type[Config]]]:
    """Yield the class and the classes of its sections, each with the dotted path of its key."""
    yield path, schema
    for name, field in schema.model_fields.items():
        part, section, place = nested(field)
        if section is not None and part is None and section.model_fields:
            yield from sections_of(section, ".".join(filter(None, [path, name, place])))


def table(schema: type[Config]) -> list[str]:
    """Return the options of a class as a table in Markdown."""
    rows = ["| option | type | default | |", "|---|---|---|---|"]
    for option in own_options(schema):
        cells = (f"`{option.key}`", _type(option), _default(option), option.text)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*rows, ""]


def _type(option: Option) -> str:
    if option.part is None:
        return option.type
    return f"[name or section](parts.md#{option.part.kind.rpartition('.')[2]})"


def _default(option: Option) -> str:
    if option.required:
        return "*required*"
    if option.part is not None:
        return f"`{option.part.default}`" if option.part.default else ""
    return "" if option.section is not None else f"`{as_yaml(option.default)}`"  # a section's options have their own


def program_page(name: str, schema: type[Config]) -> str:
    """Return the page of a program."""
    package, _, program = name.partition(".")
    key = {"app": "app", "evals": "eval_name"}[package]
    started = f"python -m {package}.main" if key in schema.model_fields else f"python -m {name}"
    lines = [f"# {program}", ""]
    lines += [f"`{started} --fname <yaml>`" + (f" with `{key}: {program}`" if key in schema.model_fields else ""), ""]
    for path, section in sections_of(schema):
        lines += [f"## `{path}`", ""] if path else []
        lines += table(section)
    return "\n".join(lines)


def part_page(parts: dict[str, Module | Factory]) -> str:
    """Return the page of all parts that are selected by their name."""
    lines = ["# Parts", "", "Sections `{name: …, **options}`; a name alone selects the default options.", ""]
    for title, part in parts.items():
        anchor = part.kind.rpartition(".")[2]
        lines += [f"## {title} {{#{anchor}}}", ""]
        for schema, names in _by_schema(part).items():
            lines += [f"### {', '.join(f'`{name}`' for name in names)}", ""]
            for path, section in sections_of(schema):
                lines += [f"`{path}`:", ""] if path else []
                lines += table(section)
    return "\n".join(lines)


def _by_schema(part: Module | Factory) -> dict[type[Config], list[str]]:
    """Return the names of parts by their options class; those of one constructor, such as vit_tiny, together."""
    found: dict[type[Config], list[str]] = {}
    by_name: dict[str, type[Config]] = {}
    for name in part.available():
        schema = part.locate({"name": name})[0]
        if isinstance(part, Factory):
            schema = by_name.setdefault(schema.__name__, schema)
        found.setdefault(schema, []).append(name)
    return found


def write(folder: Path) -> list[str]:
    """Write all pages into an empty `folder`. Returns the names of the pages in the order of the navigation."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    programs = program_options()
    pages = {name.replace(".", "_") + ".md": program_page(name, schema) for name, schema in programs.items()}
    pages["parts.md"] = part_page(PARTS)
    pages["slurm.md"] = "\n".join(
        ["# slurm", "", "Section `slurm` of jobs; see [SLURM](../slurm.md).", "", *table(SlurmConfig)]
    )
    entries = [f"- [`{name}`]({name.replace('.', '_')}.md)" for name in programs]
    entries += ["- [parts](parts.md): objectives, encoders, predictors, masks, data formats, heads"]
    entries += ["- [`slurm`](slurm.md)"]
    pages["index.md"] = INTRODUCTION + "\n".join(entries) + "\n"
    for name, page in pages.items():
        (folder / name).write_text(page.rstrip() + "\n", encoding="utf-8")
    return list(pages)
