"""The commands in docs/features.md have valid configurations."""

import re
import shlex
from pathlib import Path

import pytest

from evals.main import PROGRAMS
from tubelet.runtime import launch
from tubelet.slurm import command_line

ROOT = Path(__file__).parents[2]
SHELL = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "features.md").read_text(encoding="utf-8"), re.DOTALL)
LINES = "".join(SHELL).replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python -m evals.")])
def test_commands(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    started = []
    monkeypatch.setattr(launch, "_start", lambda program, arguments: started.append(program))
    module, *arguments = shlex.split(line)[2:]
    if module == "evals.main_distributed":
        command_line.run(PROGRAMS, arguments)
        assert "#SBATCH" in capsys.readouterr().out
    else:
        launch.run(PROGRAMS, arguments)
        assert len(started) == 1
