"""Train as a SLURM job: `python -m app.main_distributed --fname configs/pretrain/<name>.yaml [--nodes 2 …]`."""

from app.main import PROGRAMS
from tubelet.slurm.command_line import run

if __name__ == "__main__":
    run(PROGRAMS, then="evals.main")
