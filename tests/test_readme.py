"""The commands in README.md have valid configurations, and its paths, tests and make targets exist."""

import re
import shlex
from pathlib import Path

import pytest

import app.main
import evals.main
from app.study.options import Options as Study
from app.zoo.__main__ import Options as Zoo
from tubelet import config
from tubelet.runtime import launch
from tubelet.slurm import command_line

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
INLINE = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
SHELL = [code for language, code in FENCED if language == "bash"]
LINES = "\n".join([*SHELL, *(code.replace("\n", " ") for code in INLINE)]).replace("\\\n", " ").splitlines()
PROGRAMS = {"app": app.main.PROGRAMS, "evals": evals.main.PROGRAMS}
STUDIES = {"app.study": Study, "app.zoo": Zoo}
EXAMPLE = "ideas/masked_vicreg.py"  # of tests/objectives/test_readme_example.py


def commands(pattern):
    found = [line.partition(" #")[0].strip() for line in LINES if re.match(pattern, line)]
    assert found, pattern
    return found


@pytest.fixture
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", commands(r"python -m (app|evals)\.main "))
def test_programs(command, root, tmp_path, monkeypatch):
    name = EXAMPLE.removesuffix(".py").replace("/", ".")
    if name in command:
        (tmp_path / EXAMPLE).parent.mkdir()
        (code,) = (code for _, code in FENCED if code.startswith(f"# {EXAMPLE}"))
        (tmp_path / EXAMPLE).write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
    started = []
    monkeypatch.setattr(launch, "_start", lambda program, arguments: started.append(program))
    module, *arguments = shlex.split(command)[2:]
    launch.run(PROGRAMS[module.split(".")[0]], arguments)
    assert len(started) == 1


@pytest.mark.parametrize("command", commands(r"python -m app\.main_distributed .*(--fname|--batch-launch)"))
def test_jobs(command, root, tmp_path, capsys):
    (content,) = re.findall(r"echo '(.*)' > list.yaml", README)
    (tmp_path / "list.yaml").write_text(content)
    _, *arguments = shlex.split(command.replace("list.yaml", str(tmp_path / "list.yaml")))[2:]
    command_line.run(app.main.PROGRAMS, [*arguments, "--dry-run"], then="evals.main")
    assert "#SBATCH" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands(r"python -m app\.(study|zoo) "))
def test_studies(command, root):
    module, _, fname, *overrides = shlex.split(command)[2:]
    overrides += ["data=videos"] if overrides == ["data=…"] else []
    options = config.load(fname, overrides, STUDIES[module])
    assert options.folder.startswith("runs/")


@pytest.mark.parametrize("command", commands("pytest "))
def test_tests(command, root):
    _, *arguments = shlex.split(command)
    paths, _, words = " ".join(arguments).partition(" -k ")
    texts = [Path(path).read_text(encoding="utf-8") for path in paths.split()]
    assert all(re.search(rf"def test_\w*{words}", text) for text in texts)


def test_paths():
    pattern = r"(?<![\w/.])(?:app|benchmarks|configs|docs|evals|src|tests)/[\w/]*(?:\.\w+)?"
    paths = {path for path in re.findall(pattern, README) if "/my_" not in path}
    assert len(paths) > 20
    assert not {path for path in paths if not (ROOT / path).exists()}


def test_make_targets():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {command.split()[1] for command in commands("make ")} <= set(targets)
