"""torch.compile makes few graphs of a pretraining, all of them in the first steps, whatever the masks' lengths."""

from functools import partial

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from app.vjepa.train import make_trainer
from tests.gpu_guards.recipes import load_recipe
from tubelet.data import Batch
from tubelet.data.mask_draws import draw_masks
from tubelet.runtime import attention_kernels, parallelize
from tubelet.runtime.distributed import World
from tubelet.training import trainer as trainer_module

SMALL = ["encoder.embed_dim=48", "encoder.depth=2", "encoder.num_heads=4", "objective.predictor.depth=1"]
SMALL += ["objective.predictor.embed_dim=48", "objective.predictor.num_heads=4", "data.batch_size=2"]
SMALL += ["data.mask_batch_size=24", "data.crop_size=96", "data.num_frames=8", "meta.compile=true"]
MOST = 8


@pytest.fixture(autouse=True)
def _compile_without_compiler(monkeypatch):
    monkeypatch.setattr(parallelize, "compile_blocks", partial(parallelize.compile_blocks, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _prefer_a_kernel(monkeypatch):
    """As on CUDA, so that the context meets the compiler."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        trainer_module, "attention_kernels", lambda first, _: attention_kernels.attention_kernels(first, cuda)
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["meta.dtype=float32"],
        ["encoder.use_rope=true", "objective.predictor.use_rope=true"],
        ["objective.predictor.use_mask_tokens=false"],
    ],
    ids=["sin-cos", "float32", "rotary", "diffusion"],
)
def test_graphs(overrides, tmp_path):
    options = load_recipe("vjepa_vitl16", *SMALL, *overrides, f"folder={tmp_path}")
    trainer = make_trainer(options, options.optimization.schedule(300), World())
    masks, data, index, graphs, lengths = options.mask_collator(), options.data, torch.arange(2), [], []
    for step in range(12):
        pairs = draw_masks(masks, 24, seed=0, step=step, group=0, lengths=data.mask_lengths)
        lengths.append([tokens.shape[1] for side in pairs for tokens in side])
        clips = torch.randint(256, (2, 3, data.num_frames, 96, 96), dtype=torch.uint8)
        batch = Batch({"clip": clips}, {}, index, ("", ""), index, step)
        trainer.train_step(batch.with_masks(*([tokens[:2] for tokens in side] for side in pairs)))
        graphs.append(counters["stats"]["unique_graphs"])
    assert len({tuple(of_step) for of_step in lengths}) > 3
    assert 0 < graphs[0] <= MOST
    assert set(graphs[2:]) == {graphs[2]}, graphs
    assert not counters["graph_break"]
