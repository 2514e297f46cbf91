"""Measure a frozen encoder: `python -m evals.main --fname configs/evals/<name>.yaml [key.path=value …]`."""

from tubelet.training.launch import run

if __name__ == "__main__":
    run(package="evals", key="eval_name", module="eval")
