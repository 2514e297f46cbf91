"""Measure a frozen encoder as a SLURM job: `python -m evals.main_distributed --fname configs/evals/<name>.yaml`."""

from evals.main import PROGRAMS
from tubelet.slurm.command_line import run

if __name__ == "__main__":
    run(PROGRAMS)
