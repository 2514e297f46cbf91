"""The jobs of a study: programs of this repository, each a child process with its own folder."""

from dataclasses import replace

from app.study.options import Options
from app.study.plan import compute, pretraining, readouts, runs
from app.study.plan.compute import Costs
from tubelet.runtime.jobs import Job

__all__ = ["PROGRAMS", "Costs", "plan", "preparation"]

PROGRAMS = (
    "app.vjepa.train",
    "app.classification.train",
    "app.study.cost",
    "evals.video_classification_frozen.eval",
    "evals.baselines.eval",
    "tubelet.report.page",
)
"""Modules that are imported before the jobs are forked."""


def preparation(studies: dict[str, Options]) -> list[Job]:
    """Return the jobs that come before all others: clips, and where compute shall be equal a step of each objective."""
    runs.read.cache_clear()
    jobs = []
    for name, study in studies.items():
        clips = [] if study.clips is None else [pretraining.clips_job(study.folder, study.clips, study.processes)]
        costs = compute.cost_jobs(study, tuple(job.name for job in clips)) if study.compute is not None else []
        jobs += _of_data_set(name, [*clips, *costs], studies)
    return jobs


def plan(studies: dict[str, Options], costs: dict[str, Costs]) -> list[Job]:
    """Return all jobs in the order in which they should start, as far as those that they need are done.

    Args:
        studies: Name of a data set -> its study.
        costs: Measured steps of its objectives, see `compute.read_costs`; empty where compute need not be equal.
    """
    jobs = preparation(studies)
    for name, study in studies.items():
        after = ("clips",) if study.clips is not None else ()
        runs = pretraining.jobs(study, costs.get(name, {}), after)
        rest = sorted(readouts.jobs(study, costs.get(name, {}), after), key=lambda job: -job.seconds)
        jobs += _of_data_set(name, [*runs, *rest], studies)
    return jobs


def _of_data_set(name: str, jobs: list[Job], studies: dict[str, Options]) -> list[Job]:
    """Put the name of the data set before the names and sources of its jobs, where there are several."""
    if len(studies) == 1:
        return jobs
    return [
        replace(
            job,
            name=f"{name}:{job.name}",
            after=tuple(f"{name}:{other}" for other in job.after),
            source=f"{name}: {job.source}",
        )
        for job in jobs
    ]
