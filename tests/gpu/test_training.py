"""Training on a GPU: no waiting for it in a step, resumed runs, determinism, memory against the plan."""

import pytest
import torch

from benchmarks import costs, noise
from tests.gpu.conftest import OBJECTIVES
from tubelet.objectives.vjepa import VJEPA
from tubelet.runtime.distributed import World

pytestmark = pytest.mark.gpu
GIB = 2**30


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_step_does_not_wait_for_the_gpu(objective, gpu, run):
    tiny = run(objective, gpu)
    tiny.trainer.train_step(tiny.batches[0])  # the first one may wait, to check and to allocate
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in tiny.batches[1:]:
            tiny.trainer._log_step(tiny.trainer.train_step(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(tiny.trainer.log.flush(clips_per_step=4)) == 3


@pytest.mark.parametrize("objective", ["vjepa", "videomae"])
def test_resumed_run_goes_on_as_an_uninterrupted_one(objective, device, run):
    straight = run(objective, device, "meta.dtype=float32", folder="straight")
    expected = [float(straight.trainer.train_step(batch)["loss"]) for batch in straight.batches]
    before = run(objective, device, "meta.dtype=float32")
    for batch in before.batches[:2]:
        before.trainer.train_step(batch)
    before.trainer.writer.start(before.trainer.step, before.trainer.state)
    before.trainer.writer.finish()
    after = run(objective, device, "meta.dtype=float32")
    assert after.trainer.resume()
    assert after.trainer.step == 2
    resumed = [float(after.trainer.train_step(batch)["loss"]) for batch in after.batches[2:]]
    # Without deterministic kernels, sums of gradients on a GPU differ in the last bits.
    assert resumed == pytest.approx(expected[2:], rel=1e-4)


def test_deterministic_runs_are_equal_bit_for_bit(gpu, run):
    from tubelet.training.options import MetaConfig

    if "deterministic" not in MetaConfig.model_fields:
        pytest.skip("there is no option meta.deterministic")
    losses = []
    for folder in ("one", "two"):
        tiny = run("vjepa", gpu, "meta.deterministic=true", folder=folder)
        losses.append([float(tiny.trainer.train_step(batch)["loss"]) for batch in tiny.batches])
    assert losses[0] == losses[1]


def test_peak_memory_is_that_of_the_plan(gpu, tmp_path):
    """ViT-B/16 with 8 clips of 16 x 224 x 224, of which activations are the largest part."""
    overrides = ["data.datasets=[noise]", "data.batch_size=8", "data.mask_batch_size=8", "encoder.name=vit_base"]
    options = noise.read_options("configs/pretrain/vjepa_vitl16.yaml", overrides, str(tmp_path))
    world = World(0, 1, gpu)
    first, *batches = noise.batches(options, world, 3)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainer = noise.make_trainer(options, world)
    assert isinstance(trainer.objective, VJEPA)
    trainer.train_step(first)  # creates the optimizer's state
    torch.cuda.reset_peak_memory_stats()
    expected = 0.0
    for batch in batches:
        trainer.train_step(batch)
        pairs = zip(batch.masks_context, batch.masks_target, strict=True)
        tokens = [costs.Tokens(context.shape[1], target.shape[1]) for context, target in pairs]
        strategy = costs.Strategy(False, False, 1, trainer.dtype.itemsize)
        clip_bytes = costs.FP32 * batch.clips[0].numel()
        rows = costs.memory(trainer.objective, strategy, batch.num_clips, 1, clip_bytes, tokens)
        expected = max(expected, sum(rows.values()))
    measured = torch.cuda.max_memory_allocated() - before
    assert measured / GIB == pytest.approx(expected / GIB, rel=0.1)
