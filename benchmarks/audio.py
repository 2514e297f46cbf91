"""Train the tasks of `app: audio` with each kind of encoder, and print one table: `python -m benchmarks.audio`.

The runs are those of configs/audio on generated scenes: one pretraining, then classification and synchronisation from
video, sound and both, and retrieval, each with frozen pretrained encoders, with frozen random ones, and trained from
scratch. Runs that are finished are not repeated, others go on where they stopped.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from app.main import PROGRAMS
from tubelet.runtime.distributed import World
from tubelet.runtime.launch import load

MODALITIES = ("video", "sound", "video,sound")
TASKS = {"classification": MODALITIES, "synchronisation": MODALITIES[1:], "retrieval": MODALITIES[2:]}
METRICS = {"retrieval": ("sound_to_video_r1", "video_to_sound_r1")}
FROZEN = ("encoder=null", "train_encoder=false", "data.patch_size=null", "data.tubelet_size=null")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audio", description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", default="runs/audio", help="folder of the runs, with the data in `scenes`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    folder = Path(args.folder)
    scenes = folder / "scenes"
    pretrained = folder / "pretrain"
    run("pretrain", pretrained, [f"data.datasets=[{scenes}/pretrain.csv]"])
    frozen = [*FROZEN, f"pretrain.folder={pretrained}", f"sound_pretrain.folder={pretrained}"]
    random = ["pretrain.checkpoint=random", "sound_pretrain.checkpoint=random"]
    kinds = {"frozen pretrained": frozen, "frozen random": [*frozen, *random], "from scratch": []}
    rows = ["| task | encoders | " + " | ".join(MODALITIES) + " |", "|---|---|---|---|---|"]
    for task, (kind, overrides) in itertools.product(args.tasks, kinds.items()):
        cells = {}
        for modalities in TASKS[task]:
            found = []
            for seed in args.seeds:
                where = folder / "table" / task / kind.replace(" ", "_") / modalities.replace(",", "_") / f"seed-{seed}"
                changes = [*overrides, f"modalities=[{modalities}]", f"meta.seed={seed}", *lists(task, scenes)]
                run(task, where, changes)
                found.append(json.loads((where / "results.json").read_text()))
            cells[modalities] = " / ".join(mean(found, name) for name in METRICS.get(task, ("top1",)))
        rows.append(f"| {task} | {kind} | " + " | ".join(cells.get(name, "") for name in MODALITIES) + " |")
    print("\n".join(rows))


def lists(task: str, scenes: Path) -> list[str]:
    """Return the overrides that select the lists of a task."""
    kind = "sounding" if task == "classification" else "videos"
    return [f"data.dataset_train={scenes}/{kind}_train.csv", f"data.dataset_val={scenes}/{kind}_test.csv"]


def run(name: str, folder: Path, overrides: list[str]) -> None:
    """Train in `folder` with configs/audio/<name>_demo.yaml, unless it is finished."""
    if (folder / "results.json").exists():
        return
    load(PROGRAMS, f"configs/audio/{name}_demo.yaml", [f"folder={folder}", *overrides]).run(World())


def mean(results: list[dict[str, Any]], name: str) -> str:
    """Return the mean of a metric over the seeds, and its standard deviation where there are several."""
    values = [result[name] for result in results]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
