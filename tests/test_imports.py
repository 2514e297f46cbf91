"""Who may know whom, read from the import statements themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "src" / "tubelet"
# Rooms of the library that the files of a room must not import.
FORBIDDEN = {
    "layers": {"models", "masks", "data", "training", "probing", "report", "hub"},
    "models": {"masks", "data", "training", "probing", "report"},
    "masks": {"layers", "models", "data", "training", "probing", "report", "hub"},
    "data": {"layers", "models", "masks", "training", "probing", "report", "hub"},
    "training": {"layers", "models", "masks", "probing", "report", "hub"},
}


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("src/tubelet"), ids=lambda p: str(p.relative_to(ROOT)))
def test_library_file_keeps_to_its_room(path):
    names = imported(path)
    assert not {name for name in names if name.split(".")[0] in ("app", "evals", "tests", "benchmarks")}
    room = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    rooms = {name.split(".")[1] for name in names if name.startswith("tubelet.")}
    assert not rooms & FORBIDDEN.get(room, set())


@pytest.mark.parametrize(("folder", "other"), [("app", "evals"), ("evals", "app")])
def test_programs_do_not_know_each_other(folder, other):
    assert files(folder)
    for path in files(folder):
        assert not {name for name in imported(path) if name.split(".")[0] in (other, "tests", "benchmarks")}, path
