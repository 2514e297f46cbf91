"""Train: `python -m app.main --fname configs/pretrain/<name>.yaml [--devices cpu | cuda:0 …] [key.path=value …]`."""

from tubelet.training.launch import run

if __name__ == "__main__":
    run(package="app", key="app", module="train")
