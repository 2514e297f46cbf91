"""The line with which programs end."""

import logging
import sys
import types

import pytest

from tubelet.config import Config
from tubelet.runtime.distributed import World
from tubelet.runtime.ending import headline
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.launch import Program

PROBE = {"top1": 16.66, "head": "attentive", "best_head": {"index": 0, "lr": 0.001, "weight_decay": 0.01}}


class Options(Config):
    folder: str


@pytest.fixture
def run(monkeypatch, caplog, tmp_path):
    """`run(main)`: the line with which a program in the folder `tmp_path` ends, if any."""

    def call(main):
        monkeypatch.setitem(sys.modules, "ends", types.SimpleNamespace(main=lambda options, world: main()))
        caplog.clear()
        with caplog.at_level(logging.INFO, "tubelet"):
            Program("ends", Options(folder=str(tmp_path))).run(World())
        return [record.getMessage() for record in caplog.records]

    return call


def test_the_result_and_its_file_are_named_also_where_nothing_was_left_to_do(run, tmp_path):
    path = tmp_path / "results.json"
    assert run(lambda: write_json(path, PROBE)) == [f"top1 16.7 % (attentive, lr 0.001); wrote {path}"]
    assert run(lambda: None) == [f"finished before; top1 16.7 % (attentive, lr 0.001); see {path}"]
    assert run(lambda: write_json(path, {"accuracy": 50.0})) == [f"accuracy 50.0 %; wrote {path}"]
    page = tmp_path / "clusters.html"

    def cluster():
        write_json(path, {"purity": 0.5})
        write_atomic(page, "")

    assert run(cluster) == [f"wrote {path} and {page}"]


def test_pretraining_names_its_report(run, tmp_path):
    page = tmp_path / "report.html"

    def train(step):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True, exist_ok=True)
        write_atomic(page, "")

    assert run(lambda: train(1)) == [f"wrote {page}"]
    assert run(lambda: train(2)) == [f"wrote {page}"]
    assert run(lambda: train(2)) == [f"finished before; wrote {page}"]
    assert run(lambda: None) == []  # the report could not be written, which is a warning


def test_programs_without_results_say_themselves_what_they_have_written(run, tmp_path):
    assert run(lambda: write_atomic(tmp_path / "index.html", "")) == []


def test_only_rank_0_names_it(tmp_path, monkeypatch, caplog):
    main = types.SimpleNamespace(main=lambda options, world: write_json(tmp_path / "results.json", PROBE))
    monkeypatch.setitem(sys.modules, "ends", main)
    world = World(rank=1)
    monkeypatch.setattr(World, "broadcast_from_rank0", lambda self, function: None)
    with caplog.at_level(logging.INFO, "tubelet"):
        Program("ends", Options(folder=str(tmp_path))).run(world)
    assert not caplog.records


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ({"top1": 20.0, "top1_std": 1.5, "seeds": {"0": {}, "1": {}}}, "top1 20.0 ± 1.5 %"),
        ({"tasks": {"motion": {"top1": 20.0}, "few": {"top1": 10.0}}}, "motion: top1 20.0 %, few: top1 10.0 %"),
        ({"top1": 20.0, "head": "knn", "best_head": {"index": 1, "k": 5}}, "top1 20.0 % (knn, k 5)"),
        ({"sound_to_video_r1": 12.5}, "sound_to_video_r1 12.5 %"),
        ({"videos": 3}, ""),
    ],
)
def test_headline(results, text):
    assert headline(results) == text
