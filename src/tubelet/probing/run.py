"""Probes from their options to their results: the tasks and seeds of a configuration, on one frozen encoder."""

from pathlib import Path
from typing import Any

from tubelet.config import dump
from tubelet.probing import results, split
from tubelet.probing.clips import LabelledSets, labelled_sets
from tubelet.probing.encoder import FrozenEncoder, check_clip_size, load_frozen, with_normalization
from tubelet.probing.options import ProbeOptions
from tubelet.probing.probe import Probe
from tubelet.runtime.distributed import World
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.precision import warn_if_emulated
from tubelet.runtime.watchdog import Watchdog


def run(options: ProbeOptions, world: World) -> dict[str, Any]:
    """Run each task and seed of `options` in its folder; what is finished is not run again.

    All processes share the work and get the results, which are those of one process with the same global batch; rank 0
    writes them.

    Returns:
        The content of `results.json` in `options.folder`.
    """
    options = world.broadcast_from_rank0(lambda: with_normalization(options))
    tasks = {"": options}
    if options.tasks:
        tasks = {name: with_normalization(options.task(name)) for name in options.tasks}
    sets_by_task = {name: _labelled(task, world) for name, task in tasks.items()}
    with Watchdog(world, options.distributed.timeout) as watchdog:
        o = options.optimization
        encoder = load_frozen(options.pretrain, options.data, o.resolution, world, bfloat16=o.use_bfloat16)
        warn_if_emulated(encoder.dtype, world.device, "optimization.use_bfloat16=false")
        for name, task in tasks.items():
            check_clip_size(encoder.module, task.data.frames_per_clip, task.optimization.resolution, name)
        measured = {name: _all_seeds(task, encoder, sets_by_task[name], watchdog) for name, task in tasks.items()}
    if not options.tasks:
        return measured[""]
    if world.is_main:
        _write(options, {"tasks": measured})
    return {"tasks": measured}


def _labelled(options: ProbeOptions, world: World) -> LabelledSets:
    """The training and validation videos. A problem in any list is an error before anything is computed."""
    sets = labelled_sets(
        options.data,
        options.data_aug,
        resolution=options.optimization.resolution,
        seed=options.seeds[0],
        shuffle_frames=options.evaluation.shuffle_frames,
        world=world,
    )
    for seed in options.seeds:
        split.labelled_subset(sets.train.labels, options.data, seed)
    return sets


def _all_seeds(options: ProbeOptions, encoder: FrozenEncoder, sets: LabelledSets, watchdog: Watchdog) -> dict[str, Any]:
    if isinstance(options.meta.seed, int):
        return Probe(options, encoder, sets, watchdog).run()
    measured = [Probe(options.with_seed(seed), encoder, sets, watchdog).run() for seed in options.seeds]
    summary = results.over_seeds(options.seeds, measured)
    if watchdog.world.is_main:
        _write(options, summary)
    return summary


def _write(options: ProbeOptions, measured: dict[str, Any]) -> None:
    """Write the results of several tasks or seeds, and the configuration that they are of as a single probe does.

    Tasks and seeds may be added, so an earlier configuration is replaced: each probe compares that of its own folder.
    """
    folder = Path(options.folder)
    write_json(folder / "results.json", measured)
    write_atomic(folder / "config.yaml", dump(options))
