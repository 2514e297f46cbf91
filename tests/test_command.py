"""The command `tubelet` runs the programs as `python -m` does, and names itself in what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tubelet
from tubelet.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]


def run(*words, cwd, python=()):
    command = [sys.executable, *python, "-m", "tubelet", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_help_names_every_command_and_imports_nothing(tmp_path):
    done = run("--help", cwd=tmp_path, python=("-X", "importtime"))
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tubelet" in imported
    assert not imported & {"torch", "numpy", "pydantic", "yaml", "tubelet.config"}


def test_version(tmp_path):
    assert run("--version", cwd=tmp_path).stdout == f"tubelet {tubelet.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_names_the_command(name, tmp_path):
    done = run(*name.split(), "--help", cwd=tmp_path)
    assert done.stdout.startswith(f"usage: tubelet {name} "), done.stderr
    assert not any(tmp_path.iterdir())


def test_train_help_does_not_import_torch(tmp_path):
    done = run("train", "--help", cwd=tmp_path, python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tubelet.runtime.launch" in imported
    assert not imported & {"torch", "numpy"}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["trian"], 1, "error: tubelet trian: no such command. Did you mean 'train'?"),
        (["xyzzy", "--config", "x"], 1, "error: tubelet xyzzy: no such command. Commands: train, eval, "),
        (["train", "--config", "dmeo"], 1, "error: dmeo: no such file"),
        (["train"], 2, "tubelet train: error: the following arguments are required: --fname/--config"),
        (["submit"], 2, "tubelet submit: error: --config is missing"),
        (["index", "folder=x"], 1, "data: required, but not given"),
    ],
)
def test_errors(words, status, message, tmp_path):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_package_app_in_the_current_folder_is_not_run(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "main.py").write_text("raise SystemExit('the wrong one')\n")
    assert run("train", "--help", cwd=tmp_path).stdout.startswith("usage: tubelet train")
