"""The study with programs that return at once: which jobs run, in which order, and the report of their results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.study.__main__ import run
from app.study.options import Options
from app.study.plan import plan
from app.study.results import collect
from tubelet import config
from tubelet.config import ConfigError
from tubelet.runtime.jobs import JobFailed

PROGRAM = """
import json, sys
from pathlib import Path
import yaml
from tubelet.config import read

def record(text):
    with open("calls.txt", "a") as file:
        file.write(text + "\\n")

overrides = [argument for argument in sys.argv[1:] if "=" in argument]
raw = read(sys.argv[sys.argv.index("--fname") + 1], overrides)
folder = Path(raw["folder"])
folder.mkdir(parents=True, exist_ok=True)
def result(folder, top1, count):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"top1": top1, "num_val": count}))
"""
TRAIN = """
if raw["app"] == "vjepa":
    record(f"pretrain {folder} {raw['meta']['seed']} {raw['epochs']}")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {}, "data_aug": {}, "mask": [], "encoder": {}}))
    if raw.get("broken"):
        sys.exit("no space left on device")
else:
    record(f"supervised {raw['data']['dataset_train']} {raw['data']['labels_per_class']}")
    result(folder, 80.0 + raw["meta"]["seed"], 40)
"""
MEASURE = """
if raw["eval_name"] == "baselines":
    record(f"baselines {folder}")
    each = {t: {str(s): {"top1": 20.0, "num_val": 40} for s in raw["seeds"]} for t in raw["tasks"]}
    (folder / "results.json").write_text(json.dumps({"baselines": {kind: each for kind in raw["kinds"]}}))
else:
    record(f"probe {folder} {raw['epochs']}")
    for name, task in raw["tasks"].items():
        for seed in raw["meta"]["seed"]:
            base = 60.0
            if raw["pretrain"].get("checkpoint") == "random":
                base = 30.0 + 10 * raw["pretrain"]["encoder"]["init_std"]
            linear = 5.0 if task["head"]["name"] == "linear" else 0.0
            few = 20.0 if task["data"]["labels_per_class"] else 0.0
            fold = 10 if "fold1" in task["data"]["dataset_val"] else 40
            result(folder / name / f"seed-{seed}", base - linear - few + seed, fold)
"""

STUDY = {
    "folder": "runs/demo",
    "pretrain": {"fname": "pretrain.yaml", "seeds": [0, 1], "later_overrides": ["epochs=2"]},
    "random": {"init_stds": [0.1, 0.2], "seeds": [0]},
    "tasks": {
        "motion": {"train": "train{fold}.csv", "test": "test-fold{fold}.csv", "num_classes": 8},
        "motion_few": {"train": "train{fold}.csv", "test": "t.csv", "num_classes": 8, "labels_per_class": 10},
    },
    "probe": {"fname": "probe.yaml", "seeds": [0, 2]},
    "supervised": {"fname": "supervised.yaml", "seeds": [0, 2]},
    "baselines": {"kinds": ["frame", "difference"]},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for package, program in (("app", TRAIN), ("evals", MEASURE)):
        (tmp_path / package).mkdir()
        (tmp_path / package / "main.py").write_text(PROGRAM + program)
    write(tmp_path / "pretrain.yaml", {"app": "vjepa", "epochs": 5, "encoder": {"name": "vit_x"}, "data": {}})
    write(tmp_path / "probe.yaml", {"eval_name": "video_classification_frozen", "epochs": 9})
    write(tmp_path / "supervised.yaml", {"app": "classification"})
    write(tmp_path / "study.yaml", STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content):
    path.write_text(yaml.safe_dump(content))


def options(*overrides):
    return config.load("study.yaml", overrides, Options)


def calls(folder):
    path = folder / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return lines


def test_study_runs_all_jobs_once_and_reports_the_results(folder, capsys):
    run(options())
    made = calls(folder)
    assert sorted(call for call in made if call.startswith("pretrain")) == [
        "pretrain runs/demo 0 5",
        "pretrain runs/demo/seeds/1 1 2",
    ]
    assert sum(call.startswith("probe") for call in made) == 4  # two pretrained, two random; all tasks in each
    assert sum(call.startswith("supervised") for call in made) == 4  # two tasks, two seeds
    assert sum(call.startswith("baselines") for call in made) == 1

    report = json.loads((folder / "runs/demo/report.json").read_text())
    # 60 + seed for read-out seeds 0 and 2, from two pretrainings: mean 61, sample deviation of 60, 62, 60, 62.
    assert report["probe"]["pretrained"]["motion"] == [61.0, pytest.approx(1.1547, abs=1e-4)]
    assert report["linear"]["pretrained"]["motion_few"][0] == 36.0
    assert report["probe"]["random"]["motion"][0] == 32.0
    assert report["probe"]["random_best"]["motion"][0] == 33.0
    assert report["probe"]["supervised"]["motion"][0] == 81.0
    assert report["probe"]["baseline_frame"]["motion"] == [20.0, 0.0]
    assert report["standard_error"]["probe"]["pretrained"]["motion"] == pytest.approx((61 * 39 / 40) ** 0.5)
    assert "in points: motion 7.7, motion_few" in report["notes"][-1]
    assert report["margin"]["probe"]["motion"]["points"] == 28.0
    assert report["seconds"].keys() == {"pretrain", "supervised", "probe", "baselines"}
    printed = capsys.readouterr().out
    assert "61.0 ± 1.2" in printed
    assert "beats the best random one" in printed
    assert "The pretrainings of seeds 1 differ from the first one: epochs=2." in printed
    assert (folder / "runs/demo/report.html").exists()

    run(options())
    assert calls(folder) == []


def test_probe_of_a_pretrained_encoder_reads_its_run_and_of_a_random_one_the_architecture(folder):
    jobs = {job.name: job for job in plan(options())}
    pretrained = jobs["probe-fold0-pretrained-1"]
    assert pretrained.settings["pretrain"] == {"folder": "runs/demo/seeds/1"}
    assert pretrained.after == ("pretrain-fold0-seed1",)
    random = jobs["probe-fold0-random-0.2-0"]
    assert random.settings["pretrain"] == {
        "folder": None, "checkpoint": "random", "init_seed": 0, "encoder": {"name": "vit_x", "init_std": 0.2},
    }  # fmt: skip
    assert random.after == ()
    supervised = jobs["supervised-fold0-motion-0"].settings
    assert supervised["encoder"] == {"name": "vit_x"}
    few = pretrained.settings["tasks"]["motion_few-linear"]
    assert (few["head"], few["data"]["labels_per_class"]) == ({"name": "linear"}, 10)


def test_all_encoders_use_the_normalization_of_the_pretraining(folder):
    normalization = {"normalize_mean": [0.1, 0.1, 0.1], "normalize_std": [0.2, 0.2, 0.2]}
    write(folder / "pretrain.yaml", {"app": "vjepa", "epochs": 5, "encoder": {}, "data": {}, "data_aug": normalization})
    jobs = {job.name: job for job in plan(options())}
    for name in ("probe-fold0-pretrained-0", "probe-fold0-random-0.2-0", "supervised-fold0-motion-0"):
        assert normalization.items() <= jobs[name].settings["data"].items()


def test_a_changed_probe_does_not_run_pretraining_again(folder):
    run(options())
    calls(folder)
    write(folder / "probe.yaml", {"eval_name": "video_classification_frozen", "epochs": 10})
    run(options())
    made = calls(folder)
    assert len(made) == 4
    assert all(call.startswith("probe") and call.endswith(" 10") for call in made)


def test_other_pretraining_in_the_same_folder_is_refused(folder):
    run(options())
    with pytest.raises(ConfigError, match="epochs: 5 before, 6 now"):
        run(options("pretrain.overrides=['epochs=6']"))


def test_failing_program_stops_the_study_with_its_output(folder):
    with pytest.raises(JobFailed) as failure:
        run(options("pretrain.overrides=['broken=true']"))
    assert "no space left on device" in str(failure.value)
    assert "python -m app.main --fname pretrain.yaml --devices cpu broken=true folder=runs/demo" in str(failure.value)
    assert not (folder / "runs/demo/report.json").exists()


def test_each_fold_has_its_pretraining_and_accuracy_is_pooled(folder):
    chosen = options("folds=[0, 1]", "pretrain.seeds=[0]", "probe.seeds=[0, 2]", "supervised=null", "baselines=null")
    run(chosen)
    assert {call for call in calls(folder) if call.startswith("pretrain")} == {
        "pretrain runs/demo 0 5",
        "pretrain runs/demo/folds/1 0 5",
    }
    results = [r for r in collect(chosen) if (r.row, r.head, r.task) == ("pretrained", "probe", "motion")]
    assert {(r.fold, r.count) for r in results} == {(0, 40), (1, 10)}


def test_clips_are_generated_first(folder):
    jobs = plan(options("clips={clips: 100, seed: 3}"))
    assert jobs[0].command[:3] == ("tubelet.data.generated", "--folder", "runs/demo/clips")
    assert jobs[0].command[-4:] == ("--clips", "100", "--seed", "3")
    assert all("clips" in job.after for job in jobs[1:] if "pretrained" not in job.name)
    other = plan(options("clips={clips: 200, seed: 3}"))
    assert all(a.settings != b.settings for a, b in zip(jobs, other, strict=True))


def test_invalid_options_are_refused(folder):
    with pytest.raises(ConfigError, match="headline: 'motoin' is no task. Did you mean 'motion'?"):
        options("headline=motoin")
    with pytest.raises(ConfigError, match="data and lists go together"):
        options("data=/videos")
    with pytest.raises(ConfigError, match="lists: 'kth': not in tubelet/data. Valid: ut_interaction"):
        options("data=/videos", "lists=kth")
    with pytest.raises(ConfigError, match="supervised.per_task: 'motoin' is no task"):
        options("supervised.per_task={motoin: [a=1]}")


def test_overrides_of_probes_contain_their_fold(folder):
    changes = ["probe.overrides=['note=probe-{fold}']", "supervised.overrides=['note=supervised-{fold}']"]
    jobs = {job.name: job.command for job in plan(options("folds=[3, 4]", *changes))}
    for fold in (3, 4):
        assert f"note=probe-{fold}" in jobs[f"probe-fold{fold}-pretrained-0"]
        assert f"note=supervised-{fold}" in jobs[f"supervised-fold{fold}-motion-0"]


def test_help_is_quick_and_errors_are_one_line(folder):
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-X", "importtime", "-m", "app.study", "--help"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert "key.path=value" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "matplotlib", "numpy"}
    command = [sys.executable, "-m", "app.study", "--fname", "nowhere.yaml"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: nowhere.yaml: no such file\n")
