"""Shipped configurations are found by name, from any folder."""

import re
from pathlib import Path

import pytest

import app.main
import evals.main
from app.study.options import Options as Study
from app.study.plan import plan
from app.study.plan.checks import check_configurations
from app.zoo.__main__ import Options as Zoo
from app.zoo.__main__ import encoder_files
from tubelet import config
from tubelet.config import ConfigError, shipped
from tubelet.runtime import launch

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
ALL = [path.relative_to(CONFIGS).as_posix() for path in sorted(CONFIGS.rglob("*.yaml"))]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ALL)
def test_by_folder_and_name(name):
    assert shipped.find(name.removesuffix(".yaml")) == CONFIGS / name
    assert shipped.find(f"configs/{name}") == CONFIGS / name
    assert config.read(f"configs/{name}") == config.read(CONFIGS / name)


def test_by_name_alone():
    assert shipped.find("debug") == CONFIGS / "pretrain/debug.yaml"
    assert shipped.find("demo", ("pretrain", "supervised")) == CONFIGS / "pretrain/demo.yaml"
    assert shipped.find("demo", ("study",)) == CONFIGS / "study/demo.yaml"
    assert shipped.find("kth", app.main.PROGRAMS.configs) == CONFIGS / "generation/kth.yaml"
    assert shipped.find("pretrain/demo", ("study",)) == CONFIGS / "pretrain/demo.yaml"


@pytest.mark.parametrize(("package", "key"), [(app.main.PROGRAMS, "app"), (evals.main.PROGRAMS, "eval_name")])
def test_folders_of_a_package_have_its_programs(package, key):
    for folder in package.configs:
        paths = [path for path in (CONFIGS / folder).glob("*.yaml") if path.name not in ("base.yaml", "small.yaml")]
        assert paths
        assert all(key in config.read(path) for path in paths)


def test_files_of_the_user_come_first(elsewhere):
    (elsewhere / "configs/pretrain").mkdir(parents=True)
    for name in ("demo", "configs/pretrain/demo.yaml"):
        (elsewhere / name).write_text("folder: mine\n")
        assert config.read(shipped.find(name, ("pretrain",)))["folder"] == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo", "demo: the name of 4 configurations; choose one of evals/demo, pretrain/demo, study/demo, supervised"),
        ("dmeo", r"dmeo: no such file \(looked in .*\), and no .* Did you mean .*pretrain/demo"),
        ("pretrian/demo", r"pretrian/demo: no such file .* Did you mean pretrain/demo"),
        ("configs/pretrain/dbug.yaml", r"configs/pretrain/dbug.yaml: no such file .* Did you mean pretrain/debug"),
        ("xyzzy", "xyzzy: no such file .* Shipped: .*pretrain/vjepa_vitl16"),
        ("demo.yaml", r"demo.yaml: no such file \(looked in [^)]*\)$"),  # a missing file of the user's
        ("/demo", r"/demo: no such file \(looked in [^)]*\)$"),
    ],
)
def test_unknown_and_ambiguous_names(name, message):
    with pytest.raises(ConfigError, match=message):
        shipped.find(name)


def test_near_matches_are_those_of_the_command():
    with pytest.raises(ConfigError) as error:
        shipped.find("dmeo", ("pretrain", "supervised"))
    assert set(re.findall(r"\w+/demo", str(error.value))) == {"pretrain/demo", "supervised/demo"}


def test_base_of_a_file_of_the_user(elsewhere):
    for base in ("pretrain/debug", "configs/pretrain/debug.yaml"):
        (elsewhere / "own.yaml").write_text(f"base: {base}\nfolder: runs/own\n")
        assert config.read("own.yaml") == {**config.read(CONFIGS / "pretrain/debug.yaml"), "folder": "runs/own"}
    # It is relative to the file; the current folder does not matter.
    (elsewhere / "here.yaml").write_text("folder: x\n")
    (elsewhere / "below").mkdir()
    (elsewhere / "below/own.yaml").write_text("base: here.yaml\n")
    with pytest.raises(ConfigError, match=r"here\.yaml: no such file \(named as base: in below/own\.yaml\)"):
        config.read("below/own.yaml")


def test_study_finds_the_configurations_that_it_names(elsewhere):
    study = config.load(shipped.find("study/demo"), [], Study)
    jobs = plan(study.studies(), {})
    check_configurations(jobs)
    assert any("probes" in job.folder.parts for job in jobs)


def test_zoo_finds_its_folder():
    names = encoder_files(config.load(shipped.find("zoo", ("study",)), [], Zoo))
    assert {f"zoo/{name}.yaml" for name in [*names, "base"]} == {name for name in ALL if name.startswith("zoo/")}


def test_command_line_takes_names(capsys):
    package = app.main.PROGRAMS
    for option in ("--fname", "--config"):
        assert launch._parse_arguments(package, [option, "demo"]).fname == str(CONFIGS / "pretrain/demo.yaml")
    with pytest.raises(SystemExit, match="error: dmeo: no such file .* Did you mean"):
        launch._parse_arguments(package, ["--config", "dmeo"])
