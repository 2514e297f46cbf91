"""What the finished jobs of a study measured: tables, margins and sentences."""

import json
from pathlib import Path
from typing import Any

from app.study.options import Options
from app.study.plan import (
    floors_folder,
    pretrained_encoders,
    probe_folder,
    random_encoders,
    supervised_folder,
    task_name,
)
from tubelet import config
from tubelet.report import aggregate
from tubelet.report.aggregate import Result


def summarise(options: Options) -> dict[str, Any]:
    """Tables, margins and sentences from the folders of finished jobs."""
    results = collect(options)
    report = aggregate.tables(results, own_init_std=options.random.init_stds[0])
    errors = aggregate.standard_errors(results)
    margins = {
        head: {task: found for task in options.tasks if (found := aggregate.margin(report[head], task)) is not None}
        for head in options.probe.heads
    }
    return {
        "title": options.title,
        **report,
        "margin": margins,
        "standard_error": errors,
        "verdict": [aggregate.verdict(report, options.headline or next(iter(options.tasks)))],
        "notes": [*notes(options), *_notes_on_errors(errors)],
        "settings": {
            "Study": options.model_dump(mode="json"),
            "Probe": config.read(options.probe.fname, options.probe.overrides),
        },
    }


def collect(options: Options) -> list[Result]:
    """Every single result of the study's folders."""
    results = []
    for fold in options.folds:
        for encoder in pretrained_encoders(options) + random_encoders(options):
            folder = probe_folder(options, fold, encoder)
            results += [
                _result(
                    _read(folder / task_name(head, task) / f"seed-{seed}" / "results.json"),
                    row=encoder.row, head=head, task=task, seed=encoder.seed, head_seed=seed, fold=fold,
                    init_std=encoder.init_std,
                )
                for head in options.probe.heads
                for task in options.tasks
                for seed in options.probe.seeds
            ]  # fmt: skip
        if options.supervised is not None:
            results += [
                _result(
                    _read(supervised_folder(options, fold, seed, task) / "results.json"),
                    row="supervised", head="probe", task=task, seed=seed, head_seed=seed, fold=fold,
                )
                for task in options.tasks
                for seed in options.supervised.seeds
            ]  # fmt: skip
        if options.floors is not None:
            measured = _read(floors_folder(options, fold) / "results.json")["floors"]
            results += [
                _result(
                    measured[kind][task][str(seed)],
                    row=f"floor_{kind}", head="probe", task=task, seed=0, head_seed=seed, fold=fold,
                )
                for kind in options.floors.kinds
                for task in options.tasks
                for seed in options.probe.seeds
            ]  # fmt: skip
    return results


def _result(measured: dict[str, Any], **of: Any) -> Result:
    return Result(top1=measured["top1"], count=measured["num_val"], **of)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def notes(options: Options) -> list[str]:
    """How to read the table."""
    pretrain, probe, scales = options.pretrain, options.probe, options.random
    few = {name: task.labels_per_class for name, task in options.tasks.items() if task.labels_per_class is not None}
    found = [
        f"pretrained: {len(pretrain.seeds)} pretraining seed(s) × {len(probe.seeds)} read-out seed(s); random: "
        f"{len(scales.seeds)} seed(s) × {len(probe.seeds)} read-out seed(s) at each initialisation scale. ± is the "
        "sample standard deviation of single runs.",
        f"random encoders were drawn with weights of standard deviation {', '.join(map(str, scales.init_stds))}; the "
        "first is the encoder's own initialisation. The best was chosen for each column in hindsight, on the test "
        "clips, which favours the random encoder.",
        "All rows of a column use the same labelled training clips of a seed, and the same test clips.",
    ]
    if few:
        listed = ", ".join(f"{name}: {count}" for name, count in few.items())
        found.append(f"Labelled clips a class, drawn anew for each read-out seed: {listed}.")
    if pretrain.later_overrides and len(pretrain.seeds) > 1:
        found.append(
            f"The pretrainings of seeds {', '.join(map(str, pretrain.seeds[1:]))} are smaller than the one shown: "
            f"{' '.join(pretrain.later_overrides)}."
        )
    if len(options.folds) > 1:
        found.append(
            f"{len(options.folds)} folds, each with its own pretraining; accuracy is pooled over all their test videos."
        )
    return found


def _notes_on_errors(errors: dict[str, Any]) -> list[str]:
    """How far the pretrained row would move with other test videos."""
    found = errors["probe"]["pretrained"] if "pretrained" in errors.get("probe", {}) else {}
    listed = ", ".join(f"{task} {error:.1f}" for task, error in found.items())
    if not listed:
        return []
    return [f"One standard error of the pretrained probe, from the number of test videos alone, in points: {listed}."]
