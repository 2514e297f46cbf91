"""Tiny runs for the examples of the pages."""

import json
from pathlib import Path

from app.vjepa.options import Options
from app.vjepa.train import main
from tubelet import config
from tubelet.runtime.distributed import World

MASK = {"name": "multiblock3d", "num_blocks": 1, "spatial_scale": [0.5, 0.5]}


def make_options(clips, **sections):
    """Options of a pretraining run of two steps on the generated clips in the folder `clips`."""
    raw = {
        "app": "vjepa",
        "folder": "runs/example",
        "encoder": {"name": "vit_tiny", "embed_dim": 48, "depth": 2, "num_heads": 2},
        "objective": {"predictor": {"depth": 1, "embed_dim": 24, "num_heads": 2}},
        "mask": [MASK, MASK],
        "data": {
            "datasets": [str(clips / "pretrain")], "batch_size": 4, "num_workers": 0, "num_frames": 8,
            "sampling_rate": 1, "crop_size": 32, "patch_size": 8,
        },
        "optimization": {"epochs": 1, "ipe": 2, "warmup": 0, "start_lr": 1e-3, "lr": 1e-3},
        "meta": {"dtype": "float32"},
        "logging": {"monitor_clips": 4},
    }  # fmt: skip
    return config.check(raw | sections, Options, "the options")


def train(options):
    """Run pretraining; return what was logged of its steps."""
    main(options, World())
    lines = [json.loads(line) for line in (Path(options.folder) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
