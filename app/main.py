"""Train: `python -m app.main --fname configs/pretrain/<name>.yaml [--devices cpu | cuda:0 …] [key.path=value …]`."""

import tubelet.runtime.start_up  # noqa: F401, first, for Ctrl-C during the imports below
from tubelet.runtime.launch import Package, run

CONFIGS = ("pretrain", "supervised", "generation", "language", "audio", "data", "zoo")
PROGRAMS = Package("app", key="app", module="train", configs=CONFIGS)

if __name__ == "__main__":
    run(PROGRAMS)
