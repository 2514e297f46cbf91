"""The commands in docs/language.md and in the first lines of the configurations are valid."""

import re
import shlex
from pathlib import Path

import pytest

from app.main import PROGRAMS
from tubelet.runtime import launch
from tubelet.slurm import command_line

ROOT = Path(__file__).parents[2]
DOCS = "".join(re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "language.md").read_text(encoding="utf-8"), re.DOTALL))
HEADERS = "".join(
    re.sub("^# *", "", line, flags=re.MULTILINE)
    for path in sorted((ROOT / "configs" / "language").glob("*.yaml"))
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
    if line.startswith("#")
)
LINES = (DOCS + HEADERS).replace("\\\n", " ").splitlines()
COMMANDS = [line for line in LINES if line.startswith("python -m app.main")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    started = []
    monkeypatch.setattr(launch, "_start", lambda program, arguments: started.append(program))
    launch.run(PROGRAMS, shlex.split(command)[3:])
    assert len(started) == 1


def test_jobs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = "--fname configs/language/vqa_demo.yaml --partition main --dry-run slurm.device=cpu blind=true"
    command_line.run(PROGRAMS, arguments.split())
    output = capsys.readouterr().out
    assert "#SBATCH" in output
    assert "app: language" in output


def test_all_configurations_for_real_data_have_commands():
    assert all(f"language/{name}.yaml" in HEADERS for name in ("caption", "vqa", "retrieval"))
