"""The comparison of encoders: a study for each YAML of a folder, run together, one table."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.zoo import __main__ as main
from app.zoo import measure
from app.zoo.__main__ import Options as Zoo
from app.zoo.__main__ import baselines_study, encoder_files, encoder_study, plan, table
from tubelet import config
from tubelet.config import ConfigError
from tubelet.config.factories import product
from tubelet.models import ENCODERS
from tubelet.runtime.jobs import Pool

REPOSITORY = Path(__file__).parents[2]
FILES = sorted(path for path in REPOSITORY.glob("configs/zoo/*.yaml") if path.stem != "base")


@pytest.fixture
def zoo(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    return config.load("configs/study/zoo.yaml", [], Zoo)


def test_every_encoder_file_of_the_library_has_its_place(zoo):
    named = {config.read(path)["encoder"]["name"] for path in encoder_files(zoo).values()}
    classes = {name: product(factory) for name, factory in ENCODERS.available().items()}
    assert {classes[name].__module__ for name in named} == {kind.__module__ for kind in classes.values()}


def test_encoders_that_need_all_tokens_are_not_pretrained(zoo):
    for name, path in encoder_files(zoo).items():
        study = encoder_study(zoo, name, path)
        assert bool(study.pretrain.seeds) == measure.build(path).accepts_masks
        assert study.folder == f"runs/zoo/{name}"
        assert study.tasks["motion"].train == "runs/zoo/clips/motion_train.csv"


def test_jobs_of_all_encoders_have_unique_names(zoo, tmp_path):
    zoo = zoo.model_copy(update={"folder": str(tmp_path / "zoo"), "only": ["timesformer", "s3d"]})
    files = encoder_files(zoo)
    jobs = plan(zoo, files, {name: encoder_study(zoo, name, path) for name, path in files.items()})
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert names[0] == "clips"
    assert all(set(job.after) <= set(names) for job in jobs)
    expected = {"timesformer:pretrain-fold0-pretrained-0", "s3d:supervised-fold0-motion-0", "baselines:baselines-fold0"}
    assert expected < set(names)
    assert not any(name.startswith(("s3d:pretrain", "s3d:probe", "baselines:probe")) for name in names)
    assert baselines_study(zoo).supervised is None


def test_unknown_names_are_refused(zoo, tmp_path):
    with pytest.raises(ConfigError, match="clips.clip: unknown key. Did you mean 'clips'?"):
        config.load("configs/study/zoo.yaml", ["clips.clip=3"], Zoo)
    with pytest.raises(ConfigError, match="only: no 'timesfomer' in configs/zoo. Did you mean 'timesformer'?"):
        encoder_files(zoo.model_copy(update={"only": ["timesfomer"]}))
    with pytest.raises(ConfigError, match="no YAML files in"):
        encoder_files(zoo.model_copy(update={"encoders": str(tmp_path)}))


def test_costs_of_a_vision_transformer_are_the_sum_over_its_layers(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    width, depth, N, patch = 96, 4, 64, 3 * 4 * 8 * 8
    encoder = measure.build("configs/zoo/vision_transformer.yaml")
    products = N * patch * width + depth * (N * width * width * (3 + 1 + 4 + 4) + 2 * N * N * width)
    assert measure.flops(encoder, torch.randn(1, 3, 16, 32, 32)) == 2 * products
    # Twice the clips, twice the activations, up to what does not grow with the batch (positions).
    one, two = (measure.kept_bytes(encoder, torch.randn(b, 3, 16, 32, 32)) for b in (8, 16))
    assert math.isclose(two / one, 2, rel_tol=0.02)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_encoder_can_be_measured(path, monkeypatch):
    monkeypatch.setattr(measure, "BATCH_SIZE", 1)
    monkeypatch.setattr(measure, "REPEATS", 1)
    assert min(measure.facts(path).values()) > 0


def test_table_has_a_dash_for_a_missing_accuracy():
    cells = {"parameters": 2e6, "flops": 3e9, "bytes": 4e6, "clips_per_second": 5.0, "labels": [60.0, None]}
    rest = dict.fromkeys(("random", "pretrained", "random, linear", "pretrained, linear"))
    line = table({"s3d": {**cells, **rest}}).splitlines()[1]
    assert line.split() == ["s3d", "2", "3", "4", "5", "60.0", "-", "-", "-", "-"]


def rename_task(zoo, folder, name, **changes):
    tasks = {name: zoo.study["tasks"]["motion"], "other": zoo.study["tasks"]["motion"]}
    study = {**zoo.study, "tasks": tasks, **changes}
    return zoo.model_copy(update={"folder": str(folder), "only": ["timesformer", "s3d"], "study": study})


@pytest.mark.parametrize(
    ("changes", "task"), [({}, "speed"), ({"headline": "other"}, "other")], ids=["first task", "headline"]
)
def test_encoders_are_compared_on_the_headline_or_the_first_task(zoo, tmp_path, monkeypatch, capsys, changes, task):
    zoo = rename_task(zoo, tmp_path, "speed", **changes)
    monkeypatch.setattr(Pool, "run", lambda self, jobs: write_facts(tmp_path))
    accuracies = {"speed": [40.0, 1.0], "other": [60.0, 1.0]}
    monkeypatch.setattr(main, "summarise", lambda study, costs: report_of(study, accuracies))
    main.run(zoo)
    written = json.loads((tmp_path / "zoo.json").read_text())
    assert written["task"] == task
    assert written["encoders"]["s3d"]["labels"] == accuracies[task]
    assert f'Top-1 in % on the task "{task}"' in capsys.readouterr().out.replace("\n", " ")


def write_facts(folder):
    for name in ("timesformer", "s3d"):
        (folder / name / "facts").mkdir(parents=True)
        (folder / name / "facts/facts.json").write_text(json.dumps(dict.fromkeys(main.FACTS, 1.0)))


def report_of(study, accuracies):
    if study.supervised is None:
        return {"accuracy": {"baseline": {"frame": accuracies}}}
    return {"accuracy": {"fine_tuned": {"supervised": accuracies}}}


def test_an_unknown_headline_is_refused_before_anything_runs(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(Pool, "run", lambda self, jobs: pytest.fail("a job was started"))
    with pytest.raises(ConfigError, match="headline: 'sped' is no task. Did you mean 'speed'?"):
        main.run(rename_task(zoo, tmp_path, "speed", headline="sped"))


def test_help_does_not_import_torch():
    command = [sys.executable, "-X", "importtime", "-m", "app.zoo", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "key.path=value" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "matplotlib", "numpy"}
