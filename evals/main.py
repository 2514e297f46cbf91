"""Measure a frozen encoder: `python -m evals.main --fname configs/evals/<name>.yaml [key.path=value …]`."""

import tubelet.runtime.start_up  # noqa: F401, first, for Ctrl-C during the imports below
from tubelet.runtime.launch import Package, run

PROGRAMS = Package("evals", key="eval_name", module="eval", configs=("evals",))

if __name__ == "__main__":
    run(PROGRAMS)
