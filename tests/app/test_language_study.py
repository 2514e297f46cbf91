"""The comparison of models that write about videos: its jobs, and its tables from the results of runs."""

from pathlib import Path

import pytest

from app.language.options import Options as Run
from app.language_study.__main__ import job_name, plan, run_folder
from app.language_study.options import Options
from app.language_study.table import attributes, best_retrieval, measurements, tables
from app.vjepa.options import Options as Pretraining
from tubelet import config
from tubelet.data.scenes import generate
from tubelet.data.scenes.language import QUESTION_TYPES, caption
from tubelet.data.scenes.scene import Scene
from tubelet.runtime.files import write_json

REPOSITORY = Path(__file__).parents[2]
SCENE = Scene("three", "red", "square", "left", "zooms in", "flash", "swell")


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    return config.load("configs/study/language.yaml", [f"folder={tmp_path}"], Options)


def test_every_job_has_valid_options_and_waits_for_what_it_reads(study):
    jobs = {job.name: job for job in plan(study)}
    assert len(jobs) == 2 + len(study.tasks) * sum(len(row.seeds) for row in study.rows.values())
    generate.Settings(**{name.replace("-", "_"): value for name, value in jobs["scenes"].settings.items()})
    config.check(jobs["pretrain"].settings, Pretraining, "pretrain")
    for task in study.tasks:
        for row in study.rows:
            job = jobs[job_name(task, row, 0)]
            run = config.check(job.settings, Run, job.name)
            assert run.blind == (row == "blind")
            assert run.train_encoder == (row == "end to end")
            assert ("pretrain" in job.after) == (row == "pretrained")
            assert run.data.dataset_val.startswith(study.folder)


def test_tables_have_the_results_of_all_runs(study, tmp_path):
    kinds = {task.kind for task in study.tasks.values()}
    part = {"exact_match": 50.0, "accuracy": 60.0, "by_type": dict.fromkeys(QUESTION_TYPES, 60.0)}
    part |= {f"text_to_video_r{k}": float(k) for k in (1, 5, 10)}
    measured = {}
    for name, task in study.tasks.items():
        folder = run_folder(study, name, "random", 0)
        write_json(folder / "results.json", {**part, "swapped_videos": part, "lists": {"combinations": part}})
        predictions = [{"references": [caption(SCENE, 0)], "text": caption(SCENE, 1)}]
        write_json(folder / "predictions.json", predictions)
        measured[task.kind] = {"random": [measurements(folder, task.kind)] * 2}
    text = tables(measured)
    assert text.count("| random |") == len(kinds) == 3
    assert "| random | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 100.0 ± 0.0 |" in text
    assert "| random | 1.0 ± 0.0 | 5.0 ± 0.0 | 10.0 ± 0.0 | 1.0 ± 0.0 | 1.0 ± 0.0 |" in text


def test_attributes_are_read_from_captions():
    other = Scene("two", "red", "square", "left", "zooms in", "swell", "flash")
    texts = [caption(SCENE, 1), caption(other, 0), "three red squares"]
    found = attributes([{"references": [caption(SCENE, 0)], "text": text} for text in texts])
    assert {name: round(value) for name, value in found.items()} == {
        **dict.fromkeys(("color", "shape", "direction", "camera"), 67),
        **dict.fromkeys(("count", "first", "second"), 33),
    }


def test_a_perfect_model_guesses_among_equal_captions(tmp_path):
    for split in ("test", "test_combinations"):
        sentences = [{"caption": text} for text in ("a", "a", "b", "c")]
        write_json(tmp_path / f"captions_{split}.json", {"sentences": sentences})
    assert best_retrieval(tmp_path) == {"r1": 75.0, "r5": 100.0, "r10": 100.0, "combinations": 75.0}
