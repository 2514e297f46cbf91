"""Equal compute: how many steps of each objective take the same number of floating-point operations."""

from dataclasses import dataclass
from typing import Any

from app.study.options import Options
from app.study.plan.files import cost_folder
from app.study.plan.runs import Run, overrides_of, settings_of, teacher_of
from tubelet.config import ConfigError
from tubelet.runtime.files import read_json
from tubelet.runtime.jobs import Job


@dataclass(frozen=True)
class Cost:
    """A measured training step, see `app.study.cost`.

    Args:
        flops: Floating-point operations.
        seconds: Duration with nothing else running.
        clips: Clips in a step.
    """

    flops: float
    seconds: float
    clips: int


Costs = dict[str, Cost]
"""Objective -> its cost."""


def cost_jobs(study: Options, after: tuple[str, ...]) -> list[Job]:
    """Return the jobs that measure a step of each objective, one at a time, on the videos of the first fold.

    An objective with a teacher gets one of a single step: only its size matters.
    """
    jobs = []
    for name, objective in study.objectives.items() if study.pretrain.seeds else ():
        run, needed = Run(name, study.folds[0], study.pretrain.seeds[0]), after
        folder = cost_folder(study, name)
        if objective.teacher is not None:
            teacher = Run(objective.teacher.objective, run.fold, run.seed)
            short = ["optimization.epochs=1", "optimization.ipe=1", "optimization.warmup=0", "logging.monitor_clips=0"]
            overrides = [*overrides_of(study, teacher), *short, f"folder={folder / 'teacher'}"]
            fname = study.objectives[teacher.objective].fname
            command = ("app.main", "--fname", fname, "--devices", study.devices[0], *overrides)
            settings = {"clips": study.given_clips, **settings_of(study, teacher)}
            jobs.append(Job(f"cost-teacher-of-{name}", "cost", command, folder / "teacher", settings, 5, after))
            needed = (*after, f"cost-teacher-of-{name}")
        overrides = overrides_of(study, run, teacher_folder=folder / "teacher")
        command = ("app.study.cost", "--fname", objective.fname, "--folder", str(folder), *overrides)
        settings = {"clips": study.given_clips, **settings_of(study, run)}
        jobs.append(
            Job(f"cost-{name}", "cost", (*command, "--device", study.devices[0]), folder, settings, 10, needed,
                slots=study.processes)  # alone, as it measures times
        )  # fmt: skip
    return jobs


def read_costs(study: Options) -> Costs:
    """Return what the jobs have measured. Objectives whose job failed are missing."""
    found = {name: read_json(cost_folder(study, name) / "cost.json") for name in study.objectives}
    return {name: Cost(**measured) for name, measured in found.items() if measured is not None}


def known(study: Options, costs: Costs) -> list[str]:
    """Return the objectives that can be pretrained: where compute shall be equal, those with a measured step."""
    if study.compute is None:
        return list(study.objectives)
    if study.compute.reference not in (None, *costs):
        return []
    return [
        name
        for name, objective in study.objectives.items()
        if name in costs and (objective.teacher is None or objective.teacher.objective in costs)
    ]


def iterations(study: Options, run: Run, costs: Costs) -> int | None:
    """Return `optimization.ipe` of a run with its share of the compute; None where that of its YAML holds.

    Raises:
        ConfigError: The compute is less than a step in each epoch.
    """
    if study.compute is None:
        return None
    epochs = settings_of(study, run)["optimization"]["epochs"]
    ipe = int(flops(study, run, costs) / costs[run.objective].flops / epochs)
    if ipe < 1:
        raise ConfigError(
            f"compute: {run.name}: not enough for a step in each of {epochs} epochs; lower optimization.epochs"
        )
    return ipe


def flops(study: Options, run: Run, costs: Costs) -> float:
    """Return the floating-point operations that a run may take, without those of its teacher's."""
    assert study.compute is not None
    total = study.compute.flops
    if study.compute.reference is not None:
        reference = Run(study.compute.reference, study.folds[0], study.pretrain.seeds[0])
        total = costs[reference.objective].flops * steps_of(settings_of(study, reference))
    assert total is not None
    if run.student is not None:
        return total * _share(study, run.student)
    return total * (1 - _share(study, run.objective))


def steps(study: Options, run: Run, costs: Costs) -> int:
    """Return the number of steps of a run."""
    settings = settings_of(study, run)
    ipe = iterations(study, run, costs)
    return steps_of(settings) if ipe is None else settings["optimization"]["epochs"] * ipe


def milestones(study: Options, run: Run, costs: Costs) -> list[int]:
    """Return the steps of a run after which its encoder is probed for the learning curves, except for the last one."""
    if study.curves is None or run.student is not None or run.seed != study.pretrain.seeds[0]:
        return []
    count = steps(study, run, costs)
    return sorted({max(1, round(point * count)) for point in study.curves.points})


def steps_of(settings: dict[str, Any]) -> int:
    """Return the number of steps that a YAML asks for. Raises ConfigError where it depends on the number of clips."""
    optimization = settings.get("optimization", {})
    if optimization.get("ipe") is None:
        raise ConfigError(
            "optimization.ipe: equal compute and learning curves need the number of steps; set it in the YAML of the "
            "pretraining, or in pretrain.overrides"
        )
    return optimization["epochs"] * optimization["ipe"]


def spent(study: Options, run: Run, costs: Costs) -> tuple[float, float]:
    """Return clips seen and floating-point operations of a run, those of its teacher's included."""
    cost, count = costs[run.objective], float(steps(study, run, costs))
    clips, operations = count * cost.clips, count * cost.flops
    if (teacher := teacher_of(study, run)) is not None:
        more = spent(study, teacher, costs)
        clips, operations = clips + more[0], operations + more[1]
    return clips, operations


def _share(study: Options, objective: str) -> float:
    """Return the fraction of the compute that the teacher of an objective gets."""
    teacher = study.objectives[objective].teacher
    return 0.0 if teacher is None or teacher.share is None else teacher.share
