"""Results of the finished jobs of a study: tables, margins, conclusions."""

import json
from pathlib import Path
from typing import Any

from app.study.options import Options
from app.study.plan import (
    baselines_folder,
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
    """Return the tables, margins and conclusions of `study.json` from the folders of the finished jobs."""
    results = collect(options)
    report = aggregate.tables(results, default_init_std=options.random.init_stds[0])
    errors = aggregate.standard_errors(results)
    margins = {
        head: {task: margin for task in options.tasks if (margin := aggregate.margin(report[head], task)) is not None}
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
    """Read the results of all jobs."""
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
        if options.baselines is not None:
            measured = _read(baselines_folder(options, fold) / "results.json")["baselines"]
            results += [
                _result(
                    measured[kind][task][str(seed)],
                    row=f"baseline_{kind}", head="probe", task=task, seed=0, head_seed=seed, fold=fold,
                )
                for kind in options.baselines.kinds
                for task in options.tasks
                for seed in options.probe.seeds
            ]  # fmt: skip
    return results


def _result(measured: dict[str, Any], **of: Any) -> Result:
    return Result(top1=measured["top1"], count=measured["num_val"], **of)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def notes(options: Options) -> list[str]:
    """Return the notes on the table."""
    pretrain, probe, scales = options.pretrain, options.probe, options.random
    few = {name: task.labels_per_class for name, task in options.tasks.items() if task.labels_per_class is not None}
    texts = [
        f"pretrained: {len(pretrain.seeds)} pretraining seed(s) × {len(probe.seeds)} probe seed(s); random: "
        f"{len(scales.seeds)} seed(s) × {len(probe.seeds)} probe seed(s) at each initialization scale. ± is the "
        "sample standard deviation of single runs.",
        "Weights of random encoders are initialized with standard deviation "
        f"{', '.join(map(str, scales.init_stds))}; the first is the default of the encoder. The best one is selected "
        "for each column on the test clips, which favors the random encoder.",
        "All rows of a column use the same labeled training clips for a seed, and the same test clips.",
    ]
    if few:
        listed = ", ".join(f"{name}: {count}" for name, count in few.items())
        texts.append(f"Labeled clips per class, sampled for each probe seed: {listed}.")
    if pretrain.later_overrides and len(pretrain.seeds) > 1:
        texts.append(
            f"The pretrainings of seeds {', '.join(map(str, pretrain.seeds[1:]))} differ from the first one: "
            f"{' '.join(pretrain.later_overrides)}."
        )
    if len(options.folds) > 1:
        texts.append(
            f"{len(options.folds)} folds, each with its own pretraining; accuracy is pooled over all their test videos."
        )
    return texts


def _notes_on_errors(errors: dict[str, Any]) -> list[str]:
    """Return a note on the standard errors of the pretrained row."""
    pretrained = errors.get("probe", {}).get("pretrained", {})
    listed = ", ".join(f"{task} {error:.1f}" for task, error in pretrained.items())
    if not listed:
        return []
    return [f"Standard error of the pretrained probe due to the number of test videos, in points: {listed}."]
