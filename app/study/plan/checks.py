"""Errors in the options of programs are found before hours of pretraining."""

from collections.abc import Sequence

import app.main
import evals.main
from tubelet.config import ConfigError
from tubelet.runtime import launch
from tubelet.runtime.jobs import Job, finished

PACKAGES = {"app.main": app.main.PROGRAMS, "evals.main": evals.main.PROGRAMS}


def check_configurations(jobs: Sequence[Job]) -> None:
    """Check the options of all unfinished jobs that train or measure an encoder. No data is read.

    Raises:
        ConfigError: The options of a job are invalid, see `launch.load`; the message begins with their `source`.
    """
    done = finished(jobs)
    for job in jobs:
        program, *arguments = job.command
        if job.name in done or program not in PACKAGES:
            continue
        overrides = [argument for argument in arguments if "=" in argument]
        try:
            launch.load(PACKAGES[program], arguments[arguments.index("--fname") + 1], overrides)
        except ConfigError as error:
            raise ConfigError(f"{job.source}: {error}") from None
