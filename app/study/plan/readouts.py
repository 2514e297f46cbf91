"""The jobs that measure encoders: probes, learning curves, fine-tuning, supervised training, baselines."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.study.options import Options
from app.study.plan import compute, files
from app.study.plan.compute import Costs
from app.study.plan.files import Encoder, yaml_job
from app.study.plan.runs import Run, cache, settings_of
from app.study.sections import Supervised
from tubelet.runtime.jobs import Job


def jobs(study: Options, costs: Costs, after: tuple[str, ...]) -> list[Job]:
    """Return the jobs of all folds."""
    known = compute.known(study, costs)
    pretrained = [encoder for encoder in files.pretrained_encoders(study) if encoder.row in known]
    planned = []
    for fold in study.folds:
        planned += [_probe(study, fold, encoder, after) for encoder in files.random_encoders(study) + pretrained]
        planned += [job for encoder in pretrained for job in _curve(study, fold, encoder, costs)]
        planned += _supervised(study, fold, after)
        planned += [job for encoder in pretrained for job in _fine_tuned(study, fold, encoder)]
        if study.baselines is not None:
            planned.append(_baselines(study, fold, after))
    return planned


def run_of(encoder: Encoder, fold: int) -> Run:
    """Return the pretraining of a pretrained encoder."""
    return Run(encoder.row, fold, encoder.seed)


# ---------------------------------------------------------------- frozen encoders


def _probe(study: Options, fold: int, encoder: Encoder, after: tuple[str, ...]) -> Job:
    """Return the probes of an encoder for all tasks, heads and seeds, which share its features."""
    pretrain: dict[str, Any]
    if encoder.init_std is None:
        run = run_of(encoder, fold)
        after, pretrain = (run.name,), {"folder": str(run.folder(study))}
    else:
        pretrain = {
            "folder": None,
            "checkpoint": "random",
            "encoder": {**architecture(study), "init_std": encoder.init_std},
            "init_seed": encoder.seed,
            **patches(study),
        }
    pairs = [(task, head) for task in study.tasks for head in study.heads_of(task)]
    changes = _probe_changes(study, fold, pretrain, pairs)
    folder, name = files.probe_folder(study, fold, encoder), f"probe-fold{fold}-{encoder.name}"
    return yaml_job(
        study, "probe", name, study.probe, fold=fold, changes=changes, folder=folder, after=after,
        temporary=("features",),
    )  # fmt: skip


def _curve(study: Options, fold: int, encoder: Encoder, costs: Costs) -> list[Job]:
    """Return the probes of an encoder as it was at the milestones of its run."""
    if study.curves is None:
        return []
    run, planned = run_of(encoder, fold), []
    for step in compute.milestones(study, run, costs):
        pretrain = {"folder": str(run.folder(study)), "checkpoint": f"checkpoints/step-{step:08d}"}
        changes = _probe_changes(study, fold, pretrain, [(study.curve_task, study.curves.head)])
        folder = files.curve_folder(study, fold, encoder, step)
        name = f"curve-fold{fold}-{encoder.name}-step{step}"
        planned.append(
            yaml_job(
                study, "curve", name, study.probe, fold=fold, changes=changes, folder=folder, after=(run.name,),
                temporary=("features",),
            )
        )  # fmt: skip
    return planned


def _probe_changes(
    study: Options, fold: int, pretrain: dict[str, Any], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return what the YAML of probes adds to its base, for pairs of task and head."""
    tasks = {files.probe_name(head, task): _head_changes(study, fold, task, head) for task, head in pairs}
    first = next(iter(tasks.values()))["data"]
    shared = {key: first[key] for key in ("dataset_train", "dataset_val", "num_classes")}
    return {
        "pretrain": pretrain,
        "meta": {"seed": study.probe.seeds},
        "tasks": {"replace": True, **tasks},  # without those of the base
        "data": shared | cache(study) | normalization(study),
    }


def _head_changes(study: Options, fold: int, task: str, head: str) -> dict[str, Any]:
    changes = study.probe.per_head.get(head, {})
    return {
        **changes,
        "head": {**changes.get("head", {}), "name": head},
        "data": {**changes.get("data", {}), **labelled(study, fold, task)},
    }


# ---------------------------------------------------------------- training with labels


def _supervised(study: Options, fold: int, after: tuple[str, ...]) -> list[Job]:
    """Return the trainings from scratch, of the encoder that is pretrained."""
    program = study.supervised
    if program is None:
        return []
    return [
        _training(
            study, "supervised", f"supervised-fold{fold}-{task}-{seed}", program, task, seed, fold=fold, after=after,
            folder=files.supervised_folder(study, fold, seed, task),
            changes={"encoder": architecture(study)}, data={**patches(study), **normalization(study)},
        )
        for seed in program.seeds
        for task in program.tasks or study.tasks
    ]  # fmt: skip


def _fine_tuned(study: Options, fold: int, encoder: Encoder) -> list[Job]:
    """Return the trainings from a pretrained encoder."""
    program, run = study.finetune, run_of(encoder, fold)
    if program is None or encoder.row not in study.fine_tuned():
        return []
    return [
        _training(
            study, "finetune", f"finetune-fold{fold}-{encoder.name}-{task}-{seed}", program, task, seed, fold=fold,
            after=(run.name,), folder=files.finetune_folder(study, fold, encoder, seed, task),
            changes={"pretrain": {"folder": str(run.folder(study))}}, data=normalization(study),
        )
        for seed in program.seeds
        for task in program.tasks or study.tasks
    ]  # fmt: skip


def _training(
    study: Options,
    stage: str,
    name: str,
    program: Supervised,
    task: str,
    seed: int,
    *,
    fold: int,
    after: tuple[str, ...],
    folder: Path,
    changes: dict[str, Any],
    data: dict[str, Any],
) -> Job:
    changes = {**changes, "data": {**labelled(study, fold, task), **data}, "meta": {"seed": seed}}
    more = program.per_task.get(task, [])
    program = program.model_copy(update={"overrides": program.overrides + more})
    job = yaml_job(study, stage, name, program, fold=fold, changes=changes, folder=folder, after=after)
    if more:
        job = replace(job, source=f"{stage}.per_task.{task}, {job.source}")
    return replace(job, seconds=job.seconds / 3) if study.tasks[task].labels else job  # fewer labels, fewer steps


# ---------------------------------------------------------------- no network


def _baselines(study: Options, fold: int, after: tuple[str, ...]) -> Job:
    assert study.baselines is not None
    tasks = {
        name: {
            "train": study.fill(task.train, fold),
            "test": study.fill(task.test, fold),
            "num_classes": task.num_classes,
            **task.labels,
        }
        for name, task in study.tasks.items()
    }
    changes = {"eval_name": "baselines", **study.baselines.model_dump(), "tasks": tasks, "seeds": study.probe.seeds}
    folder = files.baselines_folder(study, fold)
    return yaml_job(
        study, "baselines", f"baselines-fold{fold}", None, fold=fold, changes=changes, folder=folder, after=after
    )


# ---------------------------------------------------------------- sections that several jobs share


def labelled(study: Options, fold: int, task: str) -> dict[str, Any]:
    """Return the options of `data` for the labelled clips of a task."""
    chosen = study.tasks[task]
    return {
        "dataset_train": study.fill(chosen.train, fold),
        "dataset_val": study.fill(chosen.test, fold),
        "num_classes": chosen.num_classes,
        **chosen.labels,
        **cache(study),
    }


def architecture(study: Options) -> dict[str, Any]:
    """Return the section `encoder` of the first objective, which random encoders and supervised training have."""
    return _first(study).get("encoder", {})


def patches(study: Options) -> dict[str, Any]:
    """Return the sizes of its patches."""
    data = _first(study)["data"]
    return {key: data[key] for key in ("patch_size", "tubelet_size") if key in data}


def normalization(study: Options) -> dict[str, Any]:
    """Return the normalization of its clips, which all encoders of the study use."""
    section = _first(study).get("data_aug") or {}
    return {key: section[key] for key in ("normalize_mean", "normalize_std") if key in section}


def _first(study: Options) -> dict[str, Any]:
    """Return the configuration of the first objective."""
    return settings_of(study, Run(next(iter(study.objectives)), study.folds[0], seed=0))
