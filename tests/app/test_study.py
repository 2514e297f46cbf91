"""The study with programs that return at once: which jobs run, in which order, and the report of their results."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from app.study.__main__ import run
from app.study.options import Options
from app.study.plan import plan
from app.study.plan.checks import check_configurations
from app.study.plan.compute import Cost
from app.study.plan.lists import write_lists
from app.study.results import collect, summarise
from app.study.sections import Clips
from tubelet import config
from tubelet.config import ConfigError
from tubelet.data.generated import Settings
from tubelet.runtime import command_line
from tubelet.runtime.jobs import JobFailed, Pool

REPOSITORY = Path(__file__).parents[2]
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
if "--folder" in sys.argv:
    raw["folder"] = sys.argv[sys.argv.index("--folder") + 1]
folder = Path(raw["folder"])
folder.mkdir(parents=True, exist_ok=True)
def result(folder, top1, count, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"top1": top1, "num_val": count, **more}))
"""
TRAIN = """
if raw["app"] == "vjepa":
    record(f"pretrain {folder} {raw.get('meta', {}).get('seed')} {raw['objective']['name']}")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {}, "data_aug": {}, "mask": [], "encoder": {}}))
    if raw.get("broken"):
        sys.exit("no space left on device")
else:
    start = raw.get("pretrain", {}).get("folder", "scratch")
    record(f"supervised {raw['data']['dataset_train']} {raw['data'].get('labels_per_class')} {start}")
    result(folder, (80.0 if start == "scratch" else 88.0) + raw["meta"]["seed"], 40)
"""
COST = """
record(f"cost {folder}")
if raw.get("broken"):
    sys.exit("no space left on device")
flops = {"jepa": 2e9, "mae": 1e9, "salt": 1.6e9}[raw["objective"]["name"]]
(folder / "cost.json").write_text(json.dumps({"flops": flops, "seconds": 0.5, "clips": 10}))
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
            elif raw["pretrain"].get("checkpoint"):
                base = 40.0
            linear = 5.0 if task["head"]["name"] == "linear" else 0.0
            few = 20.0 if task["data"].get("labels_per_class") else 0.0
            count = 10 if "fold1" in task["data"]["dataset_val"] else 40
            shuffled = {"shuffled_top1": 12.0} if task["head"]["name"] == "linear" else {}
            result(folder / name / f"seed-{seed}", base - linear - few + seed, count, **shuffled)
            (folder / "features").mkdir(exist_ok=True)
"""

PRETRAINING = {
    "app": "vjepa",
    "objective": {"name": "jepa"},
    "encoder": {"name": "vit_x"},
    "data": {"batch_size": 10},
    "optimization": {"epochs": 4, "ipe": 25},
}
STUDY = {
    "folder": "runs/demo",
    "objectives": {"jepa": {"fname": "pretrain.yaml"}},
    "pretrain": {"seeds": [0, 1]},
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
    for name, program in (("app/main", TRAIN), ("app/study/cost", COST), ("evals/main", MEASURE)):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PROGRAM + program)
    write(tmp_path / "pretrain.yaml", PRETRAINING)
    write(tmp_path / "probe.yaml", {"eval_name": "video_classification_frozen", "epochs": 9})
    write(tmp_path / "supervised.yaml", {"app": "classification"})
    write(tmp_path / "study.yaml", STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("app.study.__main__.check_configurations", lambda jobs: None)  # theirs are no programs
    monkeypatch.setattr("tubelet.report.figures.to_png", lambda picture: b"png")  # drawing takes most of the time
    return tmp_path


def write(path, content):
    path.write_text(yaml.safe_dump(content))


def options(*overrides):
    return config.load("study.yaml", overrides, Options)


def planned(*overrides, costs=None):
    """The jobs by name, without running any."""
    jobs = plan(options(*overrides).studies(), costs or {})
    by_name = {job.name: job for job in jobs}
    assert len(by_name) == len(jobs)
    assert all(set(job.after) <= by_name.keys() for job in jobs)
    assert len({job.folder for job in jobs}) == len(jobs)
    return by_name


def calls(folder):
    path = folder / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return lines


def report_of(folder, dataset="demo"):
    return json.loads((folder / "runs/demo/report.json").read_text())["datasets"][dataset]


def test_study_runs_all_jobs_once_and_reports_the_results(folder, capsys):
    run(options())
    made = calls(folder)
    assert sorted(call for call in made if call.startswith("pretrain")) == [
        "pretrain runs/demo 0 jepa",
        "pretrain runs/demo/seeds/1 1 jepa",
    ]
    assert sum(call.startswith("probe") for call in made) == 4  # two pretrained, two random; all tasks in each
    assert sum(call.startswith("supervised") for call in made) == 4  # two tasks, two seeds
    assert sum(call.startswith("baselines") for call in made) == 1

    data = report_of(folder)
    accuracy = data["accuracy"]
    # 60 + seed for read-out seeds 0 and 2, from two pretrainings: mean 61, sample deviation of 60, 62, 60, 62.
    assert accuracy["attentive"]["jepa"]["motion"] == [61.0, pytest.approx(1.1547, abs=1e-4)]
    assert accuracy["linear"]["jepa"]["motion_few"][0] == 36.0
    assert accuracy["linear_shuffled"]["jepa"]["motion"] == [12.0, 0.0]
    assert accuracy["attentive"]["random"]["motion"][0] == 32.0
    assert accuracy["attentive"]["random_best"]["motion"][0] == 33.0
    assert accuracy["fine_tuned"]["supervised"]["motion"][0] == 81.0
    assert accuracy["baseline"]["frame"]["motion"] == [20.0, 0.0]
    assert data["standard_error"]["attentive"]["jepa"]["motion"] == pytest.approx((61 * 39 / 40) ** 0.5)
    assert data["margin"]["attentive"]["jepa"]["motion"]["points"] == 28.0
    seconds = json.loads((folder / "runs/demo/study.json").read_text())["seconds"]
    assert seconds.keys() == {"pretrain", "supervised", "probe", "baselines"}
    printed = capsys.readouterr().out
    assert "61.0 ± 1.2" in printed
    assert "It beats the best random encoder by at least 10 points" in printed
    assert (
        "| jepa | **56.0 ± 1.2** | **61.0 ± 1.2** | - | **12.0 ± 0.0** |" in (folder / "runs/demo/table.md").read_text()
    )
    assert (folder / "runs/demo/report.html").exists()
    assert not list(folder.glob("runs/demo/probes/*/*/features"))

    run(options())
    assert calls(folder) == []


def test_probe_of_a_pretrained_encoder_reads_its_run_and_of_a_random_one_the_architecture(folder):
    jobs = planned()
    pretrained = jobs["probe-fold0-jepa-1"]
    assert pretrained.settings["pretrain"] == {"folder": "runs/demo/seeds/1"}
    assert pretrained.after == ("pretrain-fold0-jepa-1",)
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
    write(folder / "pretrain.yaml", {**PRETRAINING, "data_aug": normalization})
    jobs = planned()
    for name in ("probe-fold0-jepa-0", "probe-fold0-random-0.2-0", "supervised-fold0-motion-0"):
        assert normalization.items() <= jobs[name].settings["data"].items()


def test_a_changed_probe_does_not_run_pretraining_again(folder):
    run(options())
    calls(folder)
    write(folder / "probe.yaml", {"eval_name": "video_classification_frozen", "epochs": 10})
    run(options())
    made = calls(folder)
    assert len(made) == 4
    assert all(call.startswith("probe") and call.endswith(" 10") for call in made)


def test_tasks_of_the_probe_of_a_study_are_those_of_the_study(folder):
    own = {"own": {"data": {"dataset_train": "x.csv"}}}
    write(folder / "probe.yaml", {"eval_name": "video_classification_frozen", "epochs": 5, "tasks": own})
    job = planned()["probe-fold0-jepa-0"]
    tasks = list(job.settings["tasks"])
    assert "motion_few-linear" in tasks
    assert not {"own", "replace"} & set(tasks)
    assert list(config.read(job.command[job.command.index("--fname") + 1])["tasks"]) == tasks


def test_other_pretraining_in_the_same_folder_is_refused(folder):
    run(options())
    with pytest.raises(ConfigError, match=r"optimization\.epochs: 4 before, 6 now"):
        run(options("pretrain.overrides=['optimization.epochs=6']"))


def test_failing_program_leaves_the_results_of_the_others(folder, capsys):
    mae = "objectives.mae={fname: pretrain.yaml, overrides: ['objective.name=mae'%s]}"
    with pytest.raises(JobFailed) as failure:
        run(options(mae % ", 'broken=true'"))
    assert "no space left on device" in str(failure.value)
    assert "objective.name=mae broken=true meta.seed=0 folder=runs/demo/objectives/mae" in str(failure.value)
    assert "probe-fold0-mae-0 was left out, as pretrain-fold0-mae-0 failed" in str(failure.value)
    data = report_of(folder)
    assert data["accuracy"]["attentive"].keys() == {"jepa", "random", "random_best"}
    assert "pretrain-fold0-mae-0" in data["notes"][-1]
    assert "mae, motion: there are no results" in capsys.readouterr().out
    calls(folder)
    run(options(mae % ""))
    assert sorted(calls(folder)) == [
        "pretrain runs/demo/objectives/mae 0 mae",
        "pretrain runs/demo/objectives/mae/seeds/1 1 mae",
        "probe runs/demo/probes/fold0/mae-0 9",
        "probe runs/demo/probes/fold0/mae-1 9",
    ]


def test_each_fold_has_its_pretraining_and_accuracy_is_pooled(folder):
    chosen = options("folds=[0, 1]", "pretrain.seeds=[0]", "probe.seeds=[0, 2]", "supervised=null", "baselines=null")
    run(chosen)
    assert {call for call in calls(folder) if call.startswith("pretrain")} == {
        "pretrain runs/demo 0 jepa",
        "pretrain runs/demo/folds/1 0 jepa",
    }
    results = [r for r in collect(chosen) if (r.row, r.head, r.task) == ("jepa", "attentive", "motion")]
    assert {(r.fold, r.count) for r in results} == {(0, 40), (1, 10)}


def test_clips_are_generated_first(folder):
    jobs = list(planned("clips={clips: 100, seed: 3}").values())
    assert jobs[0].command[:3] == ("tubelet.data.generated", "--folder", "runs/demo/clips")
    assert jobs[0].command[-4:] == ("--clips", "100", "--seed", "3")
    assert all("clips" in job.after for job in jobs[1:] if "probe-fold0-jepa" not in job.name)
    other = planned("clips={clips: 200, seed: 3}").values()
    assert all(a.settings != b.settings for a, b in zip(jobs, other, strict=True))


def test_keys_and_defaults_of_clips_are_those_of_the_generator():
    assert Clips().model_dump() == asdict(Settings())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["clips.clip=3"], "clips.clip: unknown key. Did you mean 'clips'?"),
        (["clips.foo=3"], "clips.foo: unknown key. Valid: clips, fps, frames, seed, size, test, train."),
        (["headline=motoin"], "headline: 'motoin' is no task. Did you mean 'motion'?"),
        (["data=/videos"], "data and lists go together"),
        (["data=/videos", "lists=kth"], r"lists: 'kth': not in tubelet/data. .*ut_interaction"),
        (["supervised.per_task={motoin: [a=1]}"], "supervised.per_task: 'motoin' is no task"),
        (["probe.per_head={liner: {}}"], "probe.per_head: 'liner' is no head .* Did you mean 'linear'?"),
        (["probe.heads=[liner]", "probe.per_head={linear: {}}"], "  probe.heads: 'liner': .* Did you mean 'linear'?"),
        (["datasets={demo: {probe: {heads: [liner]}}}"], "  datasets.demo.probe.heads: 'liner': .* 'linear'?"),
        (["curves={head: knn}"], "curves.head: 'knn' is no head that reads the task 'motion'"),
        (["curves={points: [1]}"], "fractions of a run lie between 0 and 1"),
        (["compute={reference: jep}"], "compute.reference: 'jep' is no objective. Did you mean 'jepa'?"),
        (["compute={}"], "give either `reference`, an objective, or `flops`"),
        (["objectives.random={fname: x.yaml}"], "objectives.random: a row of the report has this name"),
        (["objectives.a={fname: x.yaml, teacher: {objective: b}}"], "a.teacher.objective: 'b' is no objective"),
        (
            ["objectives.a={fname: x.yaml, teacher: {objective: jepa}}", "compute={flops: 1e9}"],
            "a.teacher.share: with `compute` it is required",
        ),
        (["datasets={demo: {}, real: {headline: x}}"], "datasets.real.headline: 'x' is no task"),
        (["datasets={real: {pretrian: {}}}"], "  datasets.real.pretrian: unknown key. Did you mean 'pretrain'?"),
        (["datasets={real: {dat: /x}}"], "  datasets.real.dat: unknown key. Did you mean 'data'?"),
        (["datasets={real: {probe: {seed: [1]}}}"], "  datasets.real.probe.seed: unknown key. Did you mean 'seeds'?"),
        (
            ["datasets={real: {folds: [x], tasks: {motion: {num_classes: 1}}}}"],
            r"  datasets.real.folds.0: Input should be a valid integer, got 'x'\n  datasets.real.tasks.motion.num_cl",
        ),
    ],
)
def test_invalid_options_are_refused(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        options(*overrides)


def test_overrides_of_probes_contain_their_fold(folder):
    changes = ["probe.overrides=['note=probe-{fold}']", "supervised.overrides=['note=supervised-{fold}']"]
    jobs = planned("folds=[3, 4]", *changes)
    for fold in (3, 4):
        assert f"note=probe-{fold}" in jobs[f"probe-fold{fold}-jepa-0"].command
        assert f"note=supervised-{fold}" in jobs[f"supervised-fold{fold}-motion-0"].command


def test_help_is_quick_and_errors_are_one_line(folder):
    command = [sys.executable, "-X", "importtime", "-m", "app.study", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "key.path=value" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "matplotlib", "numpy"}
    command = [sys.executable, "-m", "app.study", "--fname", "nowhere.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"error: nowhere.yaml: no such file (looked in {REPOSITORY})\n")


@pytest.mark.parametrize(
    ("program", "file", "message"),
    [
        ("study", "study/zoo.yaml", "app: 'zoo' is another program; run it with python -m app.zoo --config"),
        ("study", "study/zoo_init.yaml", "app: 'zoo' is another program; run it with python -m app.zoo --config"),
        ("study", "study/language.yaml", "app: 'comparison' is another program; run it with python -m app.comparison"),
        ("study", "pretrain/demo.yaml", "app: 'vjepa' is another program; run it with python -m app.main --config"),
        ("zoo", "study/demo.yaml", "app: 'study' is another program; run it with python -m app.study --config"),
    ],
)
def test_a_file_of_another_program_is_refused_with_its_name(monkeypatch, program, file, message):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", [program, "--fname", f"configs/{file}"])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(f"app.{program}", "", Options, lambda options: pytest.fail("it was run"))
    assert str(stopped.value).startswith(f"error: configs/{file}: {message}")


def test_a_misspelt_program_is_an_invalid_option(folder):
    with pytest.raises(ConfigError, match="app: Input should be 'study', got 'stduy'"):
        options("app=stduy")


# ---------------------------------------------------------------- several objectives

SALT = "objectives.salt={fname: pretrain.yaml, overrides: ['objective={name: salt, teacher: {teacher}}'], teacher: %s}"
MAE = "objectives.mae={fname: pretrain.yaml, overrides: ['objective.name=mae']}"
COSTS = {"jepa": Cost(flops=2e9, seconds=0.5, clips=10), "mae": Cost(1e9, 0.3, 10), "salt": Cost(1.6e9, 0.4, 10)}
EQUAL = ("compute={reference: jepa}", MAE, SALT % "{objective: mae, share: 0.2}")


def override(job, key):
    """The value of an override in the command of a job."""
    (value,) = (text.partition("=")[2] for text in job.command if text.startswith(f"{key}="))
    return value


def test_all_objectives_get_the_same_operations(folder):
    jobs = planned(*EQUAL, costs={"demo": COSTS})
    total = 100 * 2e9  # 4 epochs of 25 steps of the reference
    for name in COSTS:
        spent = 4 * int(override(jobs[f"pretrain-fold0-{name}-0"], "optimization.ipe")) * COSTS[name].flops
        if name == "salt":
            assert spent == pytest.approx(0.8 * total, rel=0.02)
            teacher = jobs["pretrain-fold0-teacher-of-salt-0"]
            spent += 4 * int(override(teacher, "optimization.ipe")) * COSTS["mae"].flops
        assert 0.97 * total < spent <= total
    assert jobs["pretrain-fold0-mae-0"].seconds == pytest.approx(200 * 0.3)
    with pytest.raises(ConfigError, match="pretrain-fold0-teacher-of-salt-0: not enough for a step in each of 4 epoch"):
        planned("compute={flops: 1.5e10}", *EQUAL[1:], costs={"demo": COSTS})


def test_student_waits_for_its_teacher_of_the_same_fold_and_seed(folder):
    jobs = planned(*EQUAL, "folds=[0, 1]", costs={"demo": COSTS})
    for fold, place in ((0, ""), (1, "/folds/1")):
        student, teacher = jobs[f"pretrain-fold{fold}-salt-1"], jobs[f"pretrain-fold{fold}-teacher-of-salt-1"]
        assert student.after == (teacher.name,)
        assert str(teacher.folder) == f"runs/demo/objectives/salt{place}/seeds/1/teacher"
        assert student.settings["objective"] == {"name": "salt", "teacher": str(teacher.folder)}
        assert teacher.settings["objective"] == {"name": "mae"}
        assert teacher.settings["meta"] == {"seed": 1}


def test_without_compute_the_teacher_is_the_run_of_the_other_objective(folder):
    jobs = planned(MAE, SALT % "{objective: mae}")
    student = jobs["pretrain-fold0-salt-0"]
    assert student.after == ("pretrain-fold0-mae-0",)
    assert student.settings["objective"]["teacher"] == "runs/demo/objectives/mae"
    assert not any("teacher" in name for name in jobs)
    assert not any("ipe=" in text for text in student.command)


def test_steps_are_measured_alone_and_before_the_runs(folder):
    jobs = planned(*EQUAL, "clips={clips: 100}", costs={"demo": COSTS})
    cost = jobs["cost-salt"]
    assert cost.slots == 2
    assert cost.after == ("clips", "cost-teacher-of-salt")
    assert "objective={name: salt, teacher: runs/demo/costs/salt/teacher}" in cost.command
    assert {"optimization.epochs=1", "optimization.ipe=1"} < set(jobs["cost-teacher-of-salt"].command)
    names = list(jobs)
    assert max(map(names.index, ("cost-jepa", "cost-mae", "cost-salt"))) < names.index("pretrain-fold0-jepa-0")


def test_objectives_without_a_measured_step_are_left_out(folder):
    costs = {"demo": {"jepa": COSTS["jepa"], "salt": COSTS["salt"]}}
    names = {name.rpartition("-")[0] for name in planned(*EQUAL, costs=costs) if name.startswith("pretrain")}
    assert names == {"pretrain-fold0-jepa"}  # the teacher of salt is a mae
    without_reference = planned(*EQUAL, costs={"demo": {"mae": COSTS["mae"]}})
    assert not any(name.startswith("pretrain") for name in without_reference)
    assert "probe-fold0-random-0.1-0" in without_reference


def test_learning_curves_probe_the_milestones_of_the_first_seed(folder):
    curves = "curves={task: motion_few, head: linear, points: [0.1, 0.5]}"
    jobs = planned(*EQUAL, curves, costs={"demo": COSTS})
    assert override(jobs["pretrain-fold0-mae-0"], "logging.milestones") == "[20, 100]"
    assert not any("milestones" in text for text in jobs["pretrain-fold0-mae-1"].command)
    probe = jobs["curve-fold0-mae-0-step20"]
    assert probe.settings["pretrain"] == {
        "folder": "runs/demo/objectives/mae", "checkpoint": "checkpoints/step-00000020",
    }  # fmt: skip
    assert list(probe.settings["tasks"]) == ["motion_few-linear"]
    assert probe.after == ("pretrain-fold0-mae-0",)
    assert sum(name.startswith("curve") for name in jobs) == 3 * 2


def test_fine_tuning_starts_from_the_runs_of_the_chosen_objectives(folder):
    chosen = "finetune={fname: supervised.yaml, seeds: [3], objectives: [mae], tasks: [motion_few]}"
    tuned = {name: job for name, job in planned(MAE, chosen).items() if name.startswith("finetune")}
    assert list(tuned) == ["finetune-fold0-mae-0-motion_few-3", "finetune-fold0-mae-1-motion_few-3"]
    job = tuned["finetune-fold0-mae-1-motion_few-3"]
    assert job.settings["pretrain"] == {"folder": "runs/demo/objectives/mae/seeds/1"}
    assert "encoder" not in job.settings
    assert (job.settings["data"]["labels_per_class"], job.settings["meta"]["seed"]) == (10, 3)
    assert job.after == ("pretrain-fold0-mae-1",)


def test_each_task_is_read_by_its_heads_with_their_options(folder):
    heads = ["attentive", "linear_slots", "knn"]
    jobs = planned(
        f"probe.heads={heads}",
        "probe.per_head={knn: {head: {k: 20}, data: {num_workers: 1}}}",
        "tasks.motion_few={train: a, test: b, num_classes: 8, label_fraction: 0.01, heads: [knn]}",
    )
    probe = jobs["probe-fold0-jepa-0"].settings
    assert list(probe["tasks"]) == [*(f"motion-{head}" for head in heads), "motion_few-knn"]
    knn = probe["tasks"]["motion_few-knn"]
    assert knn["head"] == {"k": 20, "name": "knn"}
    assert knn["data"]["label_fraction"] == 0.01
    assert knn["data"]["num_workers"] == 1
    assert jobs["baselines-fold0"].settings["tasks"]["motion_few"]["label_fraction"] == 0.01


def test_comparison_of_objectives_from_start_to_end(folder, capsys):
    chosen = options(
        *EQUAL,
        "curves={head: linear, points: [0.25, 0.5]}",
        "finetune={fname: supervised.yaml, seeds: [0], tasks: [motion]}",
    )
    run(chosen)
    made = calls(folder)
    assert [call for call in made if call.startswith("cost")] == [
        f"cost runs/demo/costs/{name}" for name in ("jepa", "mae", "salt")
    ]
    data = report_of(folder)
    assert data["objectives"] == ["jepa", "mae", "salt"]
    assert data["margin"]["fine_tuned"]["mae"]["motion"]["points"] == 7.0  # 88 against 80 and 82
    cost = data["cost"]
    assert cost["mae"]["clips_per_second"] == 20.0
    assert cost["mae"]["clips"] == 2 * cost["jepa"]["clips"] == 2000
    assert all(0.97 * 200e9 < each["flops"] <= 200e9 for each in cost.values())
    curve = data["curves"]["lines"]["salt"]  # 40 steps of the teacher, then 100 of its own
    assert [point["clips"] for point in curve] == [400 + 250, 400 + 500, 400 + 1000]
    assert [point["accuracy"][0] for point in curve] == [36.0, 36.0, 56.0]
    printed = capsys.readouterr().out
    assert "salt has a frozen teacher that was pretrained with mae, which got 20% of its compute" in printed
    assert "Fine-tuned 88.0 % (over training from scratch: +7.0 points" in printed
    run(chosen)
    assert calls(folder) == []


def test_objective_whose_step_cannot_be_measured_does_not_stop_the_others(folder):
    with pytest.raises(JobFailed, match="cost-mae ended with exit status 1"):
        run(options("compute={reference: jepa}", MAE.replace("mae']", "mae', 'broken=true']")))
    data = report_of(folder)
    assert "jepa" in data["accuracy"]["attentive"]
    assert "mae" not in data["accuracy"]["attentive"]


def test_results_of_unfinished_jobs_are_not_reported(folder):
    run(options())
    (folder / "runs/demo/probes/fold0/jepa-1/done.json").unlink()
    data = summarise(options(), {})
    assert data["accuracy"]["attentive"]["jepa"]["motion"] == [61.0, pytest.approx(2**0.5)]  # one pretraining


# ---------------------------------------------------------------- several data sets

DATASETS = """datasets={
  demo: {clips: {clips: 10}},
  thermal: {lists: ut_interaction, folds: [1, 2], pretrain: {seeds: [0]}, probe: {seeds: [5]}, supervised: null},
  real: {lists: ut_interaction, data: /videos, tasks: {act: {train: a, test: b, num_classes: 2}}},
}"""


def test_data_sets_have_their_own_folders_and_options_and_are_left_out_without_data(folder):
    assert options(DATASETS, "datasets.thermal.data=/thermal").left_out() == []
    assert options(DATASETS).left_out() == ["datasets.thermal.data"]
    assert options(DATASETS, "datasets.thermal=null").left_out() == []
    studies = options(DATASETS).studies()
    assert list(studies) == ["demo", "real"]
    assert list(studies["real"].tasks) == ["motion", "motion_few", "act"]
    jobs = planned(DATASETS, "datasets.thermal.data=/thermal")
    assert jobs["demo:pretrain-fold0-jepa-1"].after == ("demo:clips",)
    thermal = jobs["thermal:probe-fold2-jepa-0"]
    assert str(thermal.folder) == "runs/demo/thermal/probes/fold2/jepa-0"
    assert thermal.after == ("thermal:pretrain-fold2-jepa-0",)
    assert (thermal.settings["meta"]["seed"], thermal.settings["epochs"]) == ([5], 9)
    assert not any(name.startswith("thermal:supervised") for name in jobs)


def test_report_of_several_data_sets(folder, capsys):
    run(options("datasets={one: {}, two: {folds: [0, 1], supervised: null}, three: {lists: ut_interaction}}"))
    assert "datasets.three.data is not given, so this data set is left out" in capsys.readouterr().out
    assert report_of(folder, "one")["accuracy"]["fine_tuned"]["supervised"]["motion"][0] == 81.0
    assert "fine_tuned" not in report_of(folder, "two")["accuracy"]
    table = (folder / "runs/demo/table.md").read_text()
    assert table.index("## one") < table.index("## two")
    assert (folder / "runs/demo/report/two_table.png").exists()


def test_study_without_any_data_says_what_to_give(folder):
    with pytest.raises(ConfigError, match="give the folder of a data set, e.g. datasets.a.data=/path"):
        run(options("datasets={a: {lists: ut_interaction}}"))
    with pytest.raises(ConfigError, match="give the folder of a data set, e.g. data=/path"):
        run(options("lists=ut_interaction"))


@pytest.fixture
def data(folder):
    """Folders `thermal`, of three dates, and `interactions`, of ten folds, with the tables of their data sets."""
    for name in ("thermal/sequences", "interactions"):
        (folder / name).mkdir(parents=True)
    dates = ("20170203", "20170206", "20170209")
    for date in dates:
        (folder / f"thermal/sequences/{date}_p1.mp4").touch()
    rows = ["file,action,date", *(f"{date}.mp4,walk,{date}" for date in dates)]
    (folder / "thermal/labels.csv").write_text("\n".join(rows))
    rows = ["path,label,sequence,fold10", *(f"{fold}.mp4,0,{fold},{fold}" for fold in range(10))]
    (folder / "interactions/labels.csv").write_text("\n".join(rows))


def data_set(keys, name="fold{fold}", pretrain="fold{fold}"):
    """A study of one data set, whose task reads the lists `name`, and whose pretraining those of `pretrain`."""
    lists = {part: f"{{folder}}/lists/{name}_{part}.csv" for part in ("train", "test")}
    changes = {
        "tasks": {"action": {**lists, "num_classes": 7}},
        "pretrain": {"overrides": [f"data.datasets=['{{folder}}/lists/{pretrain}_pretrain.csv']"]},
    }
    return {key: value for key, value in STUDY.items() if key != "tasks"} | changes | keys


THERMAL = {"lists": "thermal_actions", "data": "thermal"}
INTERACTIONS = {"lists": "ut_interaction", "data": "interactions"}


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            data_set({**THERMAL, "folds": [0, 9, 3]}),
            "folds: 9, 3; the lists fold{fold}_train.csv of thermal_actions have folds 0 to 2",
        ),
        (
            data_set({**INTERACTIONS, "folds": [10]}),
            "folds: 10; the lists fold{fold}_train.csv of ut_interaction have folds 0 to 9",
        ),
        (
            data_set({**INTERACTIONS, "folds": [4, 5]}, "fold{fold}_of5"),
            "folds: 5; the lists fold{fold}_of5_train.csv of ut_interaction have folds 0 to 4",
        ),
        (
            data_set({**INTERACTIONS, "folds": [5]}, pretrain="fold{fold}_of5"),
            "folds: 5; the lists fold{fold}_of5_pretrain.csv of ut_interaction have folds 0 to 4",
        ),
        (
            data_set(INTERACTIONS, "fold{fold}_of6"),
            "tasks.action.train: 'fold{fold}_of6_train.csv' is no list of ut_interaction. "
            "Did you mean 'fold{fold}_of5_train.csv'?",
        ),
        (
            data_set({**THERMAL, "data": "/nowhere"}),
            "data: /nowhere/labels.csv does not exist; give the folder of the thermal actions that contains labels.csv",
        ),
        (
            data_set({**INTERACTIONS, "data": "/nowhere"}),
            "data: /nowhere/labels.csv does not exist; give the folder of UT-Interaction that contains labels.csv",
        ),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_data_and_folds_are_checked_before_any_job(folder, data, monkeypatch, study, message, several):
    monkeypatch.setattr(Pool, "run", lambda self, jobs: pytest.fail("jobs were run"))
    if several:
        keys = ("lists", "data", "folds", "tasks")
        of_set = {key: study[key] for key in keys if key in study}
        study = {key: value for key, value in study.items() if key not in keys}
        study = {
            **study,
            "datasets": {"demo": {"pretrain": {"overrides": []}, "tasks": STUDY["tasks"]}, "real": of_set},
        }
        message = f"datasets.real.{message}"
    write(folder / "study.yaml", study)
    with pytest.raises(ConfigError) as error:
        run(options())
    assert str(error.value) == message


def test_lists_of_folds_that_exist_are_accepted(folder, data):
    for keys, name, folds in ((THERMAL, "fold{fold}", [0, 2]), (INTERACTIONS, "fold{fold}_of5", [4])):
        write(folder / "study.yaml", data_set({**keys, "folds": folds}, name, name))
        write_lists(options())


# ---------------------------------------------------------------- the programs themselves


def small_study(folder, **changes):
    """Two objectives, learning curves, fine-tuning: the demo with few and short jobs."""
    lists = {"train": "{folder}/clips/motion_train.csv", "test": "{folder}/clips/motion_test.csv", "num_classes": 8}
    few_steps = ["optimization.num_epochs=1", "optimization.warmup=0"]
    study = {
        "folder": str(folder / "study"),
        "clips": {"clips": 64, "train": 32, "test": 16},
        "objectives": {
            "vjepa": {"fname": "configs/pretrain/demo.yaml"},
            "videomae": {"fname": "configs/pretrain/videomae_demo.yaml"},
        },
        "compute": {"reference": "vjepa"},
        "pretrain": {
            "overrides": [
                "data.datasets=['{folder}/clips/pretrain']", "data.batch_size=8", "optimization.epochs=2",
                "optimization.ipe=4", "logging.monitor_clips=8",
            ],
        },
        "curves": {"head": "linear", "points": [0.5]},
        "random": {"init_stds": [0.12]},
        "tasks": {"motion": lists},
        "probe": {"fname": "configs/evals/demo.yaml", "overrides": ["optimization.min_steps=4", *few_steps]},
        "supervised": {"fname": "configs/supervised/demo.yaml", "overrides": few_steps},
        "finetune": {"fname": "configs/supervised/demo.yaml", "overrides": few_steps},
    }  # fmt: skip
    write(folder / "study.yaml", {**study, **changes})
    return folder / "study.yaml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"probe": {"fname": "configs/evals/demo.yaml", "per_head": {"linear": {"head": {"k": 3}}}}},
            "linear.head.k: unknown key",
        ),
        ({"finetune": {"fname": "configs/supervised/finetune.yaml", "overrides": ["optimization.epochs=3"]}}, "epochs"),
    ],
)
def test_errors_of_later_programs_are_found_before_anything_runs(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(REPOSITORY)
    study = config.load(small_study(tmp_path, curves=None, compute=None, **changes), (), Options)
    jobs = plan(study.studies(), {})
    with pytest.raises(ConfigError, match=message):
        check_configurations(jobs)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.overrides=['optimization.epoch=1']", "pretrain.overrides, objectives.videomae: configs/pretrain"),
        ("objectives.videomae.overrides=['optimization.epoch=1']", "pretrain.overrides, objectives.videomae: configs"),
        ("supervised.per_task={motion: ['optimization.epoch=1']}", "supervised.per_task.motion, supervised.overrides"),
        (
            "probe.per_head={linear: {optimization: {epoch: 1}}}",
            "probe.overrides, probe.per_head, probe .configs/evals",
        ),
    ],
)
@pytest.mark.parametrize("compute", [None, {"reference": "vjepa"}])
def test_no_job_runs_before_all_options_are_valid(tmp_path, monkeypatch, compute, override, message):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(Pool, "run", lambda self, jobs: pytest.fail("jobs were run"))
    study = config.load(small_study(tmp_path, compute=compute, curves=None), [override], Options)
    with pytest.raises(ConfigError, match=rf"(?s)^{message}.*optimization.epoch: "):
        run(study)


def test_configurations_of_the_repository_are_complete(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    demo = config.load("configs/study/demo.yaml", [f"folder={tmp_path / 'demo'}"], Options)
    check_configurations(plan(demo.studies(), {}))
    real = config.load("configs/study/real.yaml", [f"folder={tmp_path / 'real'}", "data=/videos"], Options)
    check_configurations(plan(real.studies(), {}))


@pytest.mark.slow
def test_comparison_of_two_objectives_with_the_programs_themselves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    run(config.load(small_study(tmp_path), (), Options))
    data = json.loads((tmp_path / "study/study.json").read_text())["datasets"]["study"]
    for name in ("vjepa", "videomae"):
        assert data["accuracy"]["attentive"][name]["motion"][0] >= 0
        assert "motion" in data["accuracy"]["fine_tuned"][name]
        assert len(data["curves"]["lines"][name]) == 2
        assert data["cost"][name]["seconds"] > 0
    costs = data["cost"]
    assert costs["videomae"]["gflop_per_clip"] < 0.7 * costs["vjepa"]["gflop_per_clip"]
    assert costs["videomae"]["steps"] > 1.4 * costs["vjepa"]["steps"]
    assert 0.7 < costs["videomae"]["flops"] / costs["vjepa"]["flops"] <= 1
    assert (tmp_path / "study/report/curves_flops.png").exists()
    assert "vjepa, motion: linear" in capsys.readouterr().out
