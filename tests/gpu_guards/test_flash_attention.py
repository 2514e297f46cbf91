"""Flash attention can run every attention of a pretraining step: 16 bits, no mask, contiguous channels, narrow heads.

On fake tensors, which have shapes and no values.
"""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gpu_guards.recipes import RECIPES, load_recipe
from tubelet import objectives
from tubelet.data import Batch
from tubelet.data.mask_draws import draw_masks
from tubelet.layers import attention
from tubelet.training.objective import StepRng


class Attentions(torch.overrides.TorchFunctionMode):
    """Collects, for each head width, why flash attention cannot run."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self.reasons = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            tensors, width = args[:3], args[0].shape[-1]
            self.calls[width] += 1
            dtypes = {tensor.dtype for tensor in tensors}
            if dtypes not in ({torch.bfloat16}, {torch.float16}):
                self.reasons.add(f"dtypes {dtypes}")
            if kwargs.get("attn_mask") is not None:
                self.reasons.add("a mask")
            if any(tensor.stride(-1) != 1 for tensor in tensors):
                self.reasons.add("channels that are not contiguous")
            if width % 8 or width > 256:
                self.reasons.add(f"heads of {width} channels")
        return function(*args, **kwargs)


def calls(options, monkeypatch):
    """Return the attentions of a forward pass with two clips."""
    monkeypatch.setattr(  # which is computed in fp32 on CPUs
        attention, "attention", lambda q, k, v, attend=F.scaled_dot_product_attention, **o: attend(q, k, v, **o)
    )
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)  # which reads values
    data = options.data
    masks = draw_masks(options.mask_collator(), 2, seed=0, step=0, group=0, lengths="shared")
    index = torch.arange(2)
    with FakeTensorMode(allow_non_fake_inputs=True), Attentions() as seen, torch.autocast("cpu", torch.bfloat16):
        objective = objectives.build(options.objective, options.setup(schedule_steps=1))
        height, width = data.clip_shape.height, data.clip_shape.width
        clips = torch.empty(2, 3, data.num_frames, height, width, dtype=torch.uint8)
        batch = Batch({"clip": clips}, {}, index, ("", ""), index, 0).with_masks(*masks)
        rng = StepRng(0, 0, 0)
        objective(objective.prepare_batch(batch, rng), rng)
    return seen


@pytest.mark.parametrize("name", RECIPES)
def test_flash_attention_can_run(name, monkeypatch):
    """With two blocks: what attention is given does not depend on the depth."""
    options = load_recipe(name)
    if not options.mask or options.meta.dtype == "float32" or options.objective.name == "salt":
        pytest.skip("no masks, 32 bits, or a teacher that has to be read; the student of SALT is V-JEPA's")
    levels = [] if getattr(options.encoder, "levels", 1) == 1 else ["encoder.levels=2", "objective.levels=2"]
    seen = calls(load_recipe(name, "encoder.depth=2", *levels), monkeypatch)
    assert sum(seen.calls.values()) >= 4
    assert not seen.reasons, seen.calls


def test_a_mask_is_noticed(monkeypatch):
    seen = calls(load_recipe("vjepa_vitl16", "encoder.depth=2", "encoder.block_causal=true"), monkeypatch)
    assert seen.reasons == {"a mask"}
