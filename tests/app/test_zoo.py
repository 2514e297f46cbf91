"""The zoo: a study for each YAML of a folder, measured, run together, one table."""

import math
from pathlib import Path

import pytest
import torch

from app.zoo import measure
from app.zoo.__main__ import Options as Zoo
from app.zoo.__main__ import encoder_files, floors_study, plan, study_of, text_table
from tubelet import config
from tubelet.config import ConfigError

REPOSITORY = Path(__file__).parents[2]
ENCODERS = sorted(path for path in REPOSITORY.glob("configs/zoo/*.yaml") if path.stem != "base")


@pytest.fixture
def zoo(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    return config.load("configs/study/zoo.yaml", [], Zoo)


def test_every_encoder_file_of_the_library_has_its_place(zoo):
    named = {config.read(path)["model"]["encoder"] for path in encoder_files(zoo).values()}
    with_factories = {
        path.stem for path in (REPOSITORY / "src/tubelet/models").glob("*.py") if _has_factories(path.stem)
    }
    assert named == with_factories


def _has_factories(name):
    from tubelet.models import factories

    return name != "__init__" and any(hasattr(f, "func") for f in factories(name).values())


def test_encoders_that_need_all_tokens_are_not_pretrained(zoo):
    for name, path in encoder_files(zoo).items():
        study = study_of(zoo, name, path)
        assert bool(study.pretrain.seeds) == measure.build(path).accepts_masks
        assert study.folder == f"runs/zoo/{name}"
        assert study.tasks["motion"].train == "runs/zoo/clips/motion_train.csv"


def test_jobs_of_all_encoders_have_names_of_their_own(zoo, tmp_path):
    zoo = zoo.model_copy(update={"folder": str(tmp_path / "zoo"), "only": ["timesformer", "s3d"]})
    files = encoder_files(zoo)
    jobs = plan(zoo, files, {name: study_of(zoo, name, path) for name, path in files.items()})
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert names[0] == "clips"
    assert all(set(job.after) <= set(names) for job in jobs)
    assert {"timesformer:pretrain-fold0-seed0", "s3d:supervised-fold0-motion-0", "floors:floors-fold0"} < set(names)
    assert not any(name.startswith(("s3d:pretrain", "s3d:probe", "floors:probe")) for name in names)
    assert floors_study(zoo).supervised is None


def test_names_that_do_not_exist_are_refused(zoo, tmp_path):
    with pytest.raises(ConfigError, match="only: no 'timesfomer' in configs/zoo. Did you mean 'timesformer'?"):
        encoder_files(zoo.model_copy(update={"only": ["timesfomer"]}))
    with pytest.raises(ConfigError, match="holds no YAML"):
        encoder_files(zoo.model_copy(update={"encoders": str(tmp_path)}))


def test_costs_of_a_vision_transformer_are_those_of_its_layers(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    width, depth, N, patch = 96, 4, 64, 3 * 4 * 8 * 8
    encoder = measure.build("configs/zoo/vision_transformer.yaml")
    products = N * patch * width + depth * (N * width * width * (3 + 1 + 4 + 4) + 2 * N * N * width)
    assert measure.flops(encoder, torch.randn(1, 3, 16, 32, 32)) == 2 * products
    # Twice the clips, twice the activations, up to what does not grow with the batch (positions).
    one, two = (measure.kept_bytes(encoder, torch.randn(b, 3, 16, 32, 32)) for b in (8, 16))
    assert math.isclose(two / one, 2, rel_tol=0.02)


@pytest.mark.parametrize("path", ENCODERS, ids=lambda path: path.stem)
def test_every_encoder_can_be_measured(path, monkeypatch):
    monkeypatch.setattr(measure, "BATCH_SIZE", 1)
    monkeypatch.setattr(measure, "REPEATS", 1)
    assert min(measure.facts(path).values()) > 0


def test_table_has_a_dash_where_nothing_can_be_measured():
    cells = {"parameters": 2e6, "flops": 3e9, "bytes": 4e6, "clips_per_second": 5.0, "labels": [60.0, None]}
    rest = dict.fromkeys(("random", "pretrained", "random, linear", "pretrained, linear"))
    line = text_table({"s3d": {**cells, **rest}}).splitlines()[1]
    assert line.split() == ["s3d", "2", "3", "4", "5", "60.0", "-", "-", "-", "-"]
