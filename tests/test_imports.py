"""Dependencies point downwards only: read from import statements and from module names in strings."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "src" / "tubelet"
MODULE_NAME = re.compile(r"(tubelet|app|evals|benchmarks|tests)(\.[a-z_0-9]+)+")
PROGRAMS = {"app", "evals", "benchmarks", "tests"}
# Packages of the library, and those below each that it may import.
BELOW = {
    "__init__": set(),
    "__main__": {"config", "runtime", "data", "report"},
    "grid": set(),
    "config": {"grid"},
    "runtime": {"config"},
    "layers": {"grid"},
    "masks": {"grid", "config"},
    "data": {"grid", "config", "runtime"},
    "models": {"grid", "config", "layers"},
    "training": {"grid", "config", "runtime", "data"},
    "hub": {"grid", "config", "runtime", "data", "layers", "models"},
    "probing": {"grid", "config", "runtime", "data", "layers", "models", "training", "hub"},
    "language": {"grid", "config", "runtime", "data", "layers", "models", "training", "hub", "probing"},
    "objectives": {
        *("grid", "config", "runtime", "data", "layers", "models", "masks", "training", "probing", "report"),
        "language",
    },
    "generation": {"grid", "config", "runtime", "data", "layers", "models", "hub", "report"},
    "report": {"grid", "config", "runtime", "data", "layers", "models", "masks", "hub"},
    "features": {"grid", "config", "runtime", "data", "probing", "report"},
    "slurm": {"config", "runtime"},
    "indexing": {"config", "runtime", "data"},
}
# Imported inside of a function, where it is needed.
EXCEPTIONS = {"hub/probe.py": {"probing"}}


def module_names(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, at its top or inside its functions, or names in a string."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            names.add(node.value)
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("src/tubelet"), ids=lambda p: str(p.relative_to(ROOT)))
def test_library_file_imports_only_what_is_below_it(path):
    names = module_names(path)
    relative = path.relative_to(LIBRARY)
    if str(relative) != "__main__.py":  # it runs the programs by name
        assert not {name for name in names if name.split(".")[0] in PROGRAMS}
    package = relative.parts[0].removesuffix(".py")
    imported = {name.split(".")[1] for name in names if name.startswith("tubelet.")} & BELOW.keys()
    allowed = {package, *BELOW[package], *EXCEPTIONS.get(str(relative), set())}
    assert imported <= allowed, f"{relative} may not import {imported - allowed}"


def test_every_package_has_its_dependencies_listed():
    packages = {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in files("src/tubelet")}
    assert packages == BELOW.keys()
    for package, below in BELOW.items():
        assert all(package not in BELOW[other] for other in below), f"cycle through {package}"


@pytest.mark.parametrize(("folder", "other"), [("app", "evals"), ("evals", "app")])
def test_programs_do_not_import_each_other(folder, other):
    assert files(folder)
    for path in files(folder):
        imports = {name for name in module_names(path) if name.split(".")[0] in (other, "tests", "benchmarks")}
        names_programs = path.relative_to(ROOT).parts[1] in ("study", "main_distributed.py")  # to run them
        assert not imports or names_programs, path
