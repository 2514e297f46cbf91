"""The wheel, installed into an environment of its own, does everything without a checkout."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
CLIPS = ("--folder", "runs/demo/clips", "--clips", "16", "--train", "8", "--test", "8", "--processes", "1")
TRAIN = ("optimization.epochs=1", "optimization.ipe=2", "logging.monitor_clips=0", "--devices", "cpu")

pytestmark = pytest.mark.slow


def run(*command, cwd, check=True):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("app", "benchmarks", "configs", "evals", "src"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-c", BUILD, target, cwd=source)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The folder of executables of a new environment, which sees the packages of this one, but not its tubelet."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    # The .pth files of a folder that is named in one are not read, so that editable installs there are not seen.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if shutil.which("uv"):
        install = ("uv", "pip", "install", "--offline", "--no-deps", "--python", python)
    elif importlib.util.find_spec("pip"):
        install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    else:
        pytest.skip("needs uv or pip")
    run(*install, wheel, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def pretrained(environment, tmp_path_factory):
    """A folder, which has nothing else, in which `debug` was pretrained on the demo's clips, few and for two steps."""
    folder = tmp_path_factory.mktemp("project")
    run(environment / "tubelet", "clips", *CLIPS, cwd=folder)
    run(environment / "tubelet", "train", "--config", "debug", *TRAIN, cwd=folder)
    return folder


def test_content(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names}
    assert top == {"tubelet", next(name for name in top if name.endswith(".dist-info"))}
    assert "tubelet/py.typed" in names
    tracked = [*ROOT.glob("app/**/*.py"), *ROOT.glob("evals/**/*.py"), *ROOT.glob("configs/**/*.yaml")]
    assert {f"tubelet/programs/{path.relative_to(ROOT)}" for path in tracked} <= names
    assert {str(path.relative_to(ROOT / "src")) for path in ROOT.glob("src/**/*.py")} <= names


def test_programs_are_no_packages_of_the_environment(environment, tmp_path):
    code = "import importlib.util as u, tubelet; print(tubelet.__file__, u.find_spec('app'), u.find_spec('evals'))"
    where, *specs = run(environment / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert where.startswith(str(environment.parent))
    assert specs == ["None", "None"]


def test_training_with_a_shipped_configuration(pretrained):
    log = [json.loads(line) for line in (pretrained / "runs/debug/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2
    assert sorted(path.name for path in pretrained.iterdir()) == ["runs"]


def test_several_processes_and_an_own_objective(pretrained, environment, tmp_path):
    """In the folder of a project that has packages of the names `app` and `evals`."""
    shutil.copytree(pretrained / "runs/demo", tmp_path / "runs/demo")
    for name in ("app", "evals"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the package of another project')\n")
    (tmp_path / "ideas").mkdir()
    (tmp_path / "ideas" / "mine.py").write_text("from tubelet.objectives.vjepa import Options, build\n")
    own = "base: pretrain/debug\nobjective: {name: ideas.mine}\ndata: {batch_size: 4}\n"
    (tmp_path / "own.yaml").write_text(own)
    command = ("train", "--config", "own.yaml", *TRAIN, "--processes", "2", "folder=runs/own")
    run(environment / "tubelet", *command, cwd=tmp_path)
    assert (tmp_path / "runs/own/checkpoints").is_dir()


def test_probe_with_a_shipped_configuration(pretrained, environment):
    changes = (
        "pretrain.folder=runs/debug",
        "folder=runs/probe",
        "--devices",
        "cpu",
        "optimization.num_epochs=2",
        "optimization.warmup=0",
        "optimization.min_steps=0",
    )
    run(environment / "tubelet", "eval", "--config", "demo", *changes, cwd=pretrained)
    assert (pretrained / "runs/probe/results.json").is_file()


def test_plan_and_help(environment, tmp_path):
    assert "GPU-hours" in run(environment / "tubelet", "plan", "--config", "vjepa_vitl16", cwd=tmp_path).stdout
    for words in (("--help",), ("train", "--help"), ("submit", "eval", "--help"), ("report", "--help")):
        done = run(environment / "tubelet", *words, cwd=tmp_path)
        assert done.stdout.startswith(" ".join(("usage: tubelet", *words[:-1])))
