"""The comparison of models on tasks: its jobs, and its tables from the results of runs."""

from dataclasses import asdict
from pathlib import Path

import pytest

from app.comparison.__main__ import job_name, plan, run, run_folder
from app.comparison.options import Options, Scenes
from app.comparison.table import attributes, best_retrieval, measurements, tables
from app.main import PROGRAMS
from tubelet import config
from tubelet.config import ConfigError
from tubelet.data.scenes import generate
from tubelet.data.scenes.language import QUESTION_TYPES, caption
from tubelet.data.scenes.scene import Scene
from tubelet.runtime.files import write_json
from tubelet.runtime.jobs import Pool
from tubelet.runtime.launch import load

REPOSITORY = Path(__file__).parents[2]
SCENE = Scene("three", "red", "square", "left", "zooms in", "flash", "swell")


@pytest.fixture
def comparison(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    return config.load("configs/study/language.yaml", [f"folder={tmp_path}"], Options)


def test_every_job_has_valid_options_and_waits_for_what_it_reads(comparison):
    jobs = {job.name: job for job in plan(comparison)}
    assert len(jobs) == len(comparison.scenes) + len(comparison.pretrain) + len(comparison.selected())
    for name in comparison.scenes:
        generate.Settings(**jobs[name].settings)
    for task, row in comparison.selected():
        job = jobs[job_name(task, row, 0)]
        _, _, fname, _, _, *overrides = job.command
        options = load(PROGRAMS, fname, overrides).options
        for path in (options.data.dataset_train, options.data.dataset_val):
            assert Path(path).relative_to(comparison.folder).parts[0] in job.after
        if pretrained := options.pretrain is not None and options.pretrain.checkpoint != "random":
            assert Path(options.pretrain.folder).name in job.after
        assert pretrained == (row == "pretrained")
        assert getattr(options, "blind", False) == (
            row == "without video" and task in ("captions", "answers", "retrieval")
        )
        assert options.train_encoder == (row not in ("pretrained", "random") and not getattr(options, "blind", False))


def test_keys_and_defaults_of_scenes_are_those_of_the_generator():
    assert Scenes().model_dump() == asdict(generate.Settings())
    with pytest.raises(ConfigError, match="scenes.scenes.trian: unknown key. Did you mean 'train'?"):
        config.load("configs/study/language.yaml", ["scenes.scenes.trian=3"], Options)


def test_only_the_jobs_that_the_selection_needs_are_run(comparison):
    selected = comparison.model_copy(update={"only": {"tasks": ["captions"], "rows": ["random"]}})
    assert [job.name for job in plan(selected)] == ["scenes", "captions-random-0"]
    with pytest.raises(ConfigError, match=r"only.rows: randm is unknown; there are .*random"):
        config.load("configs/study/language.yaml", ["only={rows: [randm]}"], Options)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.pretrain.overrides=['optimization.epoch=1']", r"pretrain.pretrain: configs/language/pretrain_demo"),
        (
            "tasks.answers.overrides=['optimization.epoch=1']",
            r"tasks.answers.overrides, tasks.answers.rows.[a-z ]+: configs/language/vqa_demo.yaml",
        ),
    ],
)
def test_no_job_runs_before_all_options_are_valid(comparison, monkeypatch, override, message):
    monkeypatch.setattr(Pool, "run", lambda self, jobs: pytest.fail("jobs were run"))
    options = config.load("configs/study/language.yaml", [f"folder={comparison.folder}", override], Options)
    with pytest.raises(ConfigError, match=rf"(?s)^{message}.*optimization.epoch: unknown key. Did you mean"):
        run(options)


def test_tables_have_the_results_of_all_runs(comparison):
    part = {"exact_match": 50.0, "accuracy": 60.0, "by_type": dict.fromkeys(QUESTION_TYPES, 60.0), "top1": 70.0}
    part |= {f"text_to_video_r{k}": float(k) for k in (1, 5, 10)}
    measured = {}
    for name, task in comparison.tasks.items():
        folder = run_folder(comparison, name, "random", 0)
        write_json(folder / "results.json", {**part, "swapped_videos": part, "further": {"combinations": part}})
        predictions = [{"references": [caption(SCENE, 0)], "text": caption(SCENE, 1)}]
        write_json(folder / "predictions.json", predictions)
        measured[name] = {"random": [measurements(folder, task.kind)] * 2}
    text = tables(measured, {name: task.kind for name, task in comparison.tasks.items()})
    assert "| captions, all | 50.0 ± 0.0 |" in text
    assert "| retrieval, R@1 | 1.0 ± 0.0 |" in text
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
    assert best_retrieval(tmp_path) == {"R@1": 75.0, "R@5": 100.0, "R@10": 100.0, "combinations": 75.0}
