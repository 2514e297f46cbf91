"""Results of the finished jobs of a study: accuracies, learning curves, costs, conclusions."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.study.options import Options
from app.study.plan import Costs, compute, files
from app.study.plan.files import Encoder
from app.study.plan.runs import Run, settings_of, teacher_of
from tubelet.report import aggregate
from tubelet.report.aggregate import BASELINE, FINE_TUNED, Result
from tubelet.runtime.files import read_json
from tubelet.runtime.jobs import DONE

SHUFFLED = "shuffled_top1"
"""Key in results.json of a probe: accuracy with the frames in random order, where the probe measures it."""


def summarise(study: Options, costs: Costs) -> dict[str, Any]:
    """Return what `study.json` says of a data set, from the folders of the finished jobs."""
    results = list(collect(study))
    report = aggregate.tables(results, default_init_std=study.random.init_stds[0])
    report |= {"objectives": list(study.objectives), "tasks": list(study.tasks), "headline": study.main_task}
    errors = aggregate.standard_errors(results)
    return {
        **report,
        "margin": aggregate.margins(report),
        "standard_error": errors,
        "curves": curves(study, costs),
        "cost": {name: cost(study, name, costs) for name in compute.known(study, costs) if name in costs},
        "verdict": [aggregate.verdict(report, study.main_task, name) for name in study.objectives],
        "notes": [*notes(study), *_notes_on_errors(errors, study.main_task)],
    }


def collect(study: Options) -> Iterator[Result]:
    """Read the results of all finished jobs."""
    for fold in study.folds:
        for encoder in files.pretrained_encoders(study) + files.random_encoders(study):
            folder = files.probe_folder(study, fold, encoder)
            for task in study.tasks:
                for head in study.heads_of(task):
                    yield from _probe(study, folder, fold, encoder, task, head)
        yield from _trained_with_labels(study, fold)
        yield from _baselines(study, fold)


def _probe(study: Options, folder: Path, fold: int, encoder: Encoder, task: str, head: str) -> Iterator[Result]:
    for seed in study.probe.seeds:
        measured = _read(folder, files.probe_name(head, task), f"seed-{seed}", "results.json")
        if measured is None:
            continue
        of = {"row": encoder.row, "task": task, "seed": encoder.seed, "head_seed": seed, "fold": fold}
        yield _result(measured, head=head, init_std=encoder.init_std, **of)
        if measured.get(SHUFFLED) is not None:
            shuffled = {**measured, "top1": measured[SHUFFLED]}
            yield _result(shuffled, head=head + aggregate.SHUFFLED, init_std=encoder.init_std, **of)


def _trained_with_labels(study: Options, fold: int) -> Iterator[Result]:
    """Read the results of training from scratch, and of fine-tuning each pretrained encoder."""
    trained = [(study.supervised, None), *((study.finetune, encoder) for encoder in files.pretrained_encoders(study))]
    for program, encoder in trained:
        if program is None:
            continue
        for task in program.tasks or study.tasks:
            for seed in program.seeds:
                if encoder is None:
                    folder = files.supervised_folder(study, fold, seed, task)
                    of = {"row": "supervised", "seed": seed}
                else:
                    folder = files.finetune_folder(study, fold, encoder, seed, task)
                    of = {"row": encoder.row, "seed": encoder.seed}
                if (measured := _read(folder, "results.json")) is not None:
                    yield _result(measured, head=FINE_TUNED, task=task, head_seed=seed, fold=fold, **of)


def _baselines(study: Options, fold: int) -> Iterator[Result]:
    if study.baselines is None:
        return
    measured = _read(files.baselines_folder(study, fold), "results.json")
    if measured is None:
        return
    for kind in study.baselines.kinds:
        for task in study.tasks:
            for seed in study.probe.seeds:
                single = measured["baselines"][kind][task][str(seed)]
                yield _result(single, row=kind, head=BASELINE, task=task, seed=0, head_seed=seed, fold=fold)


def _result(measured: dict[str, Any], **of: Any) -> Result:
    return Result(top1=measured["top1"], count=measured["num_val"], **of)


def _read(folder: Path, *parts: str) -> dict[str, Any] | None:
    """Read a result of a job; None where the job is not done."""
    return read_json(folder.joinpath(*parts)) if (folder / DONE).is_file() else None


# ---------------------------------------------------------------- learning curves


def curves(study: Options, costs: Costs) -> dict[str, Any]:
    """Return the accuracy of each objective during its run.

    Returns:
        `task`, `head`, and `lines`: objective -> points `{"clips", "flops", "accuracy": [mean, std]}`, the teacher's
        clips and operations included; `flops` is None where they were not measured. Empty without learning curves.
    """
    if study.curves is None:
        return {}
    task, head = study.curve_task, study.curves.head
    lines = {}
    for name in compute.known(study, costs) if study.pretrain.seeds else ():
        encoder = Encoder(name, study.pretrain.seeds[0])
        run = Run(name, study.folds[0], encoder.seed)
        of_step = {
            step: [
                result
                for fold in study.folds
                for result in _probe(study, files.curve_folder(study, fold, encoder, step), fold, encoder, task, head)
            ]
            for step in compute.milestones(study, run, costs)
        }
        of_step[compute.steps(study, run, costs)] = [
            result
            for fold in study.folds
            for result in _probe(study, files.probe_folder(study, fold, encoder), fold, encoder, task, head)
        ]
        lines[name] = [
            {**_seen(study, run, costs, step), "accuracy": aggregate.mean_and_std(aggregate.pooled_over_folds(found))}
            for step, results in of_step.items()
            if (found := [result for result in results if result.head == head])
        ]
    return {"task": task, "head": head, "lines": {name: points for name, points in lines.items() if points}}


def _seen(study: Options, run: Run, costs: Costs, step: int) -> dict[str, float | None]:
    """Return the clips that a run has seen after `step`, and its floating-point operations."""
    if run.objective not in costs:
        data = settings_of(study, run)["data"]
        return {"clips": step * data["batch_size"] * data.get("num_clips", 1), "flops": None}
    teacher = teacher_of(study, run)
    clips, flops = (0.0, 0.0) if teacher is None else compute.spent(study, teacher, costs)
    cost = costs[run.objective]
    return {"clips": clips + step * cost.clips, "flops": flops + step * cost.flops}


# ---------------------------------------------------------------- costs


def cost(study: Options, name: str, costs: Costs) -> dict[str, Any]:
    """Return what an objective costs.

    Returns:
        Of a step, measured with nothing else running: `gflop_per_clip`, `clips_per_second`. Of a whole run, its
        teacher's included: `clips`, `steps`, `flops`, and the mean of the measured `seconds` (None before any is done).
    """
    step = costs[name]
    run = Run(name, study.folds[0], study.pretrain.seeds[0])
    clips, flops = compute.spent(study, run, costs)
    return {
        "gflop_per_clip": step.flops / step.clips / 1e9,
        "clips_per_second": step.clips / step.seconds,
        "steps": compute.steps(study, run, costs),
        "clips": clips,
        "flops": flops,
        "seconds": _mean_seconds(study, name),
    }


def _mean_seconds(study: Options, name: str) -> float | None:
    """Return the mean duration of the finished runs of an objective, each with its teacher's."""
    measured = []
    for seed in study.pretrain.seeds:
        for fold in study.folds:
            run: Run | None = Run(name, fold, seed)
            markers = []
            while run is not None:
                markers.append(read_json(run.folder(study) / DONE))
                run = teacher_of(study, run)
            if all(markers):
                measured.append(sum(marker["seconds"] for marker in markers))
    return statistics.fmean(measured) if measured else None


# ---------------------------------------------------------------- notes


def notes(study: Options) -> list[str]:
    """Return the notes on the table."""
    pretrain, probe, scales = study.pretrain, study.probe, study.random
    texts = [
        f"Pretrained encoders: {len(pretrain.seeds)} pretraining seed(s) × {len(probe.seeds)} probe seed(s); random "
        f"encoders: {len(scales.seeds)} seed(s) × {len(probe.seeds)} probe seed(s) at each initialization scale. ± is "
        "the sample standard deviation of single runs.",
        "Weights of random encoders are initialized with standard deviation "
        f"{', '.join(map(str, scales.init_stds))}; the first is the default of the encoder. The best one is selected "
        "for each column on the test clips, which favors the random encoder.",
        "All rows of a column use the same labeled training clips for a seed, and the same test clips.",
    ]
    if few := {name: task.labels for name, task in study.tasks.items() if task.labels}:
        listed = ", ".join(
            f"{name}: {labels.get('labels_per_class') or format(labels['label_fraction'], '.0%')}"
            for name, labels in few.items()
        )
        texts.append(f"Labeled clips per class, as a number or fraction, sampled for each probe seed: {listed}.")
    if study.compute is not None:
        whose = "a given number" if study.compute.reference is None else f"as many as {study.compute.reference}"
        texts.append(
            f"Each pretraining has the same floating-point operations ({whose}), counted in a step of it: forward and "
            "backward pass of all of its encoders, without reading and augmenting the clips."
        )
    for name, objective in study.objectives.items():
        if (teacher := objective.teacher) is not None:
            share = "" if teacher.share is None else f", which got {teacher.share:.0%} of its compute"
            texts.append(f"{name} has a frozen teacher that was pretrained with {teacher.objective}{share}.")
    if len(study.folds) > 1:
        texts.append(
            f"{len(study.folds)} folds, each with its own pretraining; accuracy is pooled over all their test videos."
        )
    return [*texts, *_notes_on_encoders(study)]


def _notes_on_encoders(study: Options) -> list[str]:
    """Return a note on objectives whose encoder is another one than that of the first."""
    encoders = {name: settings_of(study, Run(name, study.folds[0], 0)).get("encoder") for name in study.objectives}
    first = next(iter(encoders.values()))
    others = [name for name, encoder in encoders.items() if encoder != first]
    if not others:
        return []
    return [
        f"The encoder of {', '.join(others)} has other options than that of {next(iter(encoders))}, which the random "
        "and the supervised encoders have, too."
    ]


def _notes_on_errors(errors: dict[str, Any], task: str) -> list[str]:
    """Return a note on the standard errors of the headline."""
    found = [row[task] for head, rows in errors.items() if head != BASELINE for row in rows.values() if task in row]
    if not found:
        return []
    return [f"Standard error due to the number of test videos: at most {max(found):.1f} points on {task}."]
