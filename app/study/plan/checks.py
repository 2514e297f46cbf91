"""Errors in the YAML files of a study are found before hours of pretraining."""

from collections.abc import Sequence

import app.main
import evals.main
from tubelet.runtime import launch
from tubelet.runtime.jobs import Job, finished

PACKAGES = {"app.main": app.main.PROGRAMS, "evals.main": evals.main.PROGRAMS}


def check_configurations(jobs: Sequence[Job]) -> None:
    """Check the configuration of one unfinished job of each stage and data set.

    Pretrainings are left out: they come first, and one of them may need the folder of another.

    Raises:
        ConfigError: See `launch.load`.
    """
    done = finished(jobs)
    waiting = [job for job in jobs if job.name not in done and job.stage not in ("pretrain", "cost")]
    first = {(job.name.partition(":")[0] if ":" in job.name else "", job.stage): job for job in reversed(waiting)}
    for job in first.values():
        program, *arguments = job.command
        if program in PACKAGES:
            overrides = [argument for argument in arguments if "=" in argument]
            launch.load(PACKAGES[program], arguments[arguments.index("--fname") + 1], overrides)
