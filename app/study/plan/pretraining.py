"""The pretrainings of a study, and the clips that are generated for them."""

from pathlib import Path
from typing import Any

from app.study.options import Options
from app.study.plan import compute
from app.study.plan.compute import Costs
from app.study.plan.runs import Run, overrides_of, runs, settings_of, teacher_of
from app.study.sections import Clips
from tubelet import config
from tubelet.runtime.jobs import Job


def clips_job(folder: str, clips: Clips, processes: int) -> Job:
    """Return the job that generates the clips in `<folder>/clips`."""
    target = Path(folder) / "clips"
    command = ["tubelet.data.generated", "--folder", str(target), "--processes", str(processes)]
    return Job(
        name="clips",
        stage="clips",
        command=(*command, *clips.command_line()),
        folder=target,
        settings=clips.given(),
        seconds=45,
        keep=True,
        slots=processes,
    )


def jobs(study: Options, costs: Costs, after: tuple[str, ...]) -> list[Job]:
    """Return the pretrainings of the objectives whose cost is known, where compute shall be equal; teachers first."""
    planned = []
    for run in runs(study):
        if run.objective not in compute.known(study, costs):
            continue
        if (teacher := teacher_of(study, run)) is not None and teacher.student is not None:
            planned.append(_job(study, teacher, costs, after))
        planned.append(_job(study, run, costs, after))
    return planned


def _job(study: Options, run: Run, costs: Costs, after: tuple[str, ...]) -> Job:
    fname, seconds = study.objectives[run.objective].fname, study.seconds.pretrain
    changes: dict[str, Any] = {"meta.seed": run.seed}
    if (ipe := compute.iterations(study, run, costs)) is not None:
        changes["optimization.ipe"] = ipe
        seconds = compute.steps(study, run, costs) * costs[run.objective].seconds
    if milestones := compute.milestones(study, run, costs):
        changes["logging.milestones"] = milestones
    if (teacher := teacher_of(study, run)) is not None:
        after = (*after, teacher.name)
    overrides = [*overrides_of(study, run), *(f"{key}={value}" for key, value in changes.items())]
    settings = settings_of(study, run)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        settings = config.merge(settings, {section: {name: value}})
    folder = run.folder(study)
    source = f"objectives.{run.objective}"
    return Job(
        name=run.name,
        stage="pretrain",
        command=("app.main", "--fname", fname, "--devices", *study.devices, *overrides, f"folder={folder}"),
        folder=folder,
        settings={"clips": study.given_clips, **settings, "folder": str(folder)},
        seconds=seconds,
        after=after,
        keep=True,
        source=f"pretrain.overrides, {source}" if study.pretrain.overrides else source,
    )
