"""Complete training steps of the published ViT-L/16 recipes, each beside the model of transformers."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from app.vjepa.options import Options
from benchmarks import costs, noise
from benchmarks import step as peer
from benchmarks.gpu.session import Session
from tubelet import objectives
from tubelet.data import Batch, to_float
from tubelet.objectives.vjepa import VJEPA

Step = Callable[[Batch], object]

TINY = [
    *("encoder.embed_dim=48", "encoder.depth=2", "encoder.num_heads=2"),
    *("objective.predictor.embed_dim=24", "objective.predictor.depth=1", "objective.predictor.num_heads=2"),
    *("data.crop_size=64", "data.num_frames=4", "data.batch_size=2", "data.mask_batch_size=2", "meta.dtype=float32"),
    "data.num_workers=0",
]
NO_CHECKPOINTING = [
    "encoder.use_activation_checkpointing=false",
    "objective.predictor.use_activation_checkpointing=false",
]
BATCHES = 4  # with masks, and so lengths, of their own


def matrix_rate(session: Session) -> None:
    """Rate of large matrix products, of which the training steps take a share."""
    rate = session.matrix_rate()
    session.record("product of 8192 x 8192 matrices", note=f"{rate / 1e12:.1f} TFLOP/s", details={"flops": rate})


def eager(session: Session, fname: str) -> None:
    """Measure the step without compilation, and two versions of the peer."""
    options, batches, rate = prepare(session, fname)
    measured = partial(measure, session, options, batches, rate)
    session.attempt("Tubelet, eager", lambda: measured(tubelet_step(session, options)))
    session.attempt(
        "Tubelet, eager, each mask by itself", lambda: measured(tubelet_step(session, options, packed=False)), 15
    )
    session.attempt(
        "VJEPA2Model on context tokens, eager", lambda: measured(transformers_step(session, options, True)), 15
    )
    session.attempt("VJEPA2Model.forward, eager", lambda: measured(transformers_step(session, options, False)), 15)


def compiled(session: Session, fname: str) -> None:
    """Measure the compiled step, and the peer with compiled layers."""
    options, batches, rate = prepare(session, fname)
    measured = partial(measure, session, options, batches, rate)
    session.attempt("Tubelet, meta.compile", lambda: measured(tubelet_step(session, options, compiled=True)))
    session.attempt(
        "VJEPA2Model on context tokens, compiled layers",
        lambda: measured(transformers_step(session, options, True, compiled=True)),
        30,
    )


def prepare(session: Session, fname: str) -> tuple[Options, list[Batch], float]:
    """Return the options of the recipe, batches in host memory, and the rate of matrix products in FLOP/s."""
    overrides = [*NO_CHECKPOINTING, *(TINY if session.tiny else [])]
    options = noise.read_options(fname, overrides, str(session.scratch / "run"))
    return options, list(noise.batches(options, session.world, BATCHES)), session.matrix_rate()


def measure(session: Session, options: Options, batches: Sequence[Batch], rate: float, step: Step) -> dict[str, Any]:
    """Measure a training step over several batches, whose copies from the host are included.

    Returns:
        The fields of a `Record`. The share counts Tubelet's operations, also for a peer that computes more.
    """
    first = session.milliseconds(lambda: step(batches[0]))
    for batch in batches[1:]:  # the other lengths
        step(batch)

    def all_batches() -> None:
        for batch in batches:
            step(batch)

    duration = session.median_milliseconds(all_batches, calls=1 if session.tiny else 5) / len(batches)
    session.synchronize()
    start = time.perf_counter()
    step(batches[0])
    host = (time.perf_counter() - start) * 1e3  # without waiting for the device
    session.synchronize()
    clips = batches[0].num_clips
    return {
        "milliseconds": duration,
        "first_milliseconds": first,
        "clips_per_second": clips / duration * 1e3,
        "share": operations(options, batches) / (duration / 1e3) / rate,
        "note": f"{host:.0f} ms on the host",
        "details": {"host_ms": host, "operations": operations(options, batches), "matrix_rate": rate, "clips": clips},
        **session.memory(),
    }


def operations(options: Options, batches: Sequence[Batch]) -> float:
    """Return the mean number of floating-point operations of a step."""
    jepa, total = on_meta(options), 0.0
    for batch in batches:
        pairs = zip(batch.masks_context, batch.masks_target, strict=True)
        tokens = [costs.Tokens(context.shape[1], target.shape[1]) for context, target in pairs]
        flops = sum(costs.step_flops(jepa, batch.num_clips, tokens).values(), costs.Flops())
        total += flops.forward + flops.backward
    return total / len(batches)


def tubelet_step(session: Session, options: Options, compiled: bool = False, packed: bool = True) -> Step:
    """Return the step of Tubelet's trainer."""
    options = options.model_copy(update={"meta": options.meta.model_copy(update={"compile": compiled})})
    with session.device:
        trainer = noise.make_trainer(options, session.world)
    if not packed:
        encode_each_mask_by_itself(trainer.objective)
    return trainer.train_step


def encode_each_mask_by_itself(jepa: VJEPA) -> None:
    """Call encoder and predictor once for each mask, where they would compute several masks at once."""
    together = jepa.encoder.forward

    def forward(video: Tensor, masks: Any = None, **options: Any) -> Any:
        if isinstance(masks, list):
            return [together(video, mask, **options) for mask in masks]
        return together(video, masks, **options)

    jepa.encoder.forward = forward
    jepa.predictor.packs_masks = False


def transformers_step(session: Session, options: Options, only_context: bool, compiled: bool = False) -> Step:
    """Return the same step written with VJEPA2Model, which has rotary positions."""
    clip, predictor = options.data.clip_shape, options.objective.predictor
    setting = peer.Setting(
        options.encoder.name,
        *(getattr(predictor, name) for name in ("embed_dim", "depth", "num_heads")),
        batch_size=options.data.batch_size,
        num_frames=clip.num_frames,
        crop_size=clip.height,
        device=session.device.type,
        dtype=options.dtype_on(session.device),
        patch_size=clip.patch_size,
        tubelet_size=clip.tubelet_size,
    )
    model = peer.vjepa2_like(on_meta(options), setting)
    step = peer.transformers_step(setting, model, only_context, compiled)
    aug = options.data_aug

    def on_batch(batch: Batch) -> float:
        batch = batch.to(session.device)
        clips = to_float(batch.clips, aug.normalize_mean, aug.normalize_std)
        return step(clips, list(batch.masks_context), list(batch.masks_target))

    return on_batch


def on_meta(options: Options) -> VJEPA:
    """Build the objective without memory for its weights."""
    with torch.device("meta"):
        return objectives.build(options.objective, options.setup(schedule_steps=1))
