"""The notebooks of examples/: small, without traces of the machine that ran them, and executed from top to bottom."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MAX_BYTES = 300_000
"""Of a notebook with its outputs."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@every_notebook
def test_content(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < MAX_BYTES
    for name in (str(ROOT), str(Path.home()), tempfile.gettempdir()):
        assert f"{name}/" not in text
    notebook = read(path)
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert "".join(notebook["cells"][0]["source"]).startswith("# ")
    for cell in code_cells(notebook):
        assert not {"execution", "collapsed"} & cell["metadata"].keys()
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", "progress bars and warnings: remove them"


@every_notebook
def test_outputs_are_of_a_run_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in code_cells(read(path))]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.slow
@pytest.mark.timeout(900)
@every_notebook
def test_executes(path, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    folder = tmp_path / "examples"
    shutil.copytree(ROOT / "examples", folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(folder / path.name, as_version=4)
    for cell in code_cells(notebook):
        cell["outputs"] = []
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(
        notebook, timeout=600, startup_timeout=300, kernel_name="python3", resources=resources
    ).execute()
    kept = {cell["id"]: cell["outputs"] for cell in code_cells(read(path))}
    for cell in code_cells(notebook):
        shown = [output for output in cell["outputs"] if output.get("name") != "stderr"]
        kinds = [output["output_type"] for output in shown]
        assert kinds == [output["output_type"] for output in kept[cell["id"]]], "run the notebook again and save it"
