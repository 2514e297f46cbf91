"""One sequence with the tokens of all masks, plain and compiled, against one mask at a time."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from tubelet.data import Batch
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.objectives.vjepa import VJEPA, Options
from tubelet.objectives.vjepa2_1 import VJEPA21
from tubelet.objectives.vjepa2_1 import Options as DenseOptions
from tubelet.runtime.parallelize import compile_blocks
from tubelet.training.objective import StepRng

SIZES = {"img_size": 32, "patch_size": 8, "num_frames": 8, "tubelet_size": 2}
TOKENS, BATCH = 64, 3
VJEPA2 = {"use_rope": True, "rope_pairing": "vjepa2", "use_silu": True}
# Changes of: encoder and predictor, encoder, predictor.
CASES = {
    "sin-cos": ({}, {}, {}),
    "rotary": (VJEPA2, {}, {}),
    "checkpointing": ({"use_rope": True, "use_activation_checkpointing": True}, {}, {}),
    "block-causal": ({}, {"block_causal": True}, {}),
    "noised targets": ({}, {}, {"use_mask_tokens": False}),
    "levels": (VJEPA2, {"levels": 2}, {"levels": 2, "predict_context": True}),
}


def make_objective(case):
    both, of_encoder, of_predictor = CASES[case]
    torch.manual_seed(0)
    encoder = VisionTransformer(**SIZES, embed_dim=48, depth=3, num_heads=4, init_std=0.1, **both, **of_encoder)
    changes = {"use_mask_tokens": True, "num_mask_tokens": 3, "zero_init_mask_tokens": False, **both, **of_predictor}
    predictor = VisionTransformerPredictor(
        **SIZES, embed_dim=48, predictor_embed_dim=24, depth=2, num_heads=2, init_std=0.1, **changes
    )
    if case == "levels":
        return VJEPA21(encoder, predictor, DenseOptions(levels=2))
    return VJEPA(encoder, predictor, Options(inv_coeff=1.0, std_coeff=1.0, cov_coeff=1.0))


def one_mask_at_a_time(objective):
    """A copy of the objective whose encoder and predictor get one mask in each call."""
    objective = copy.deepcopy(objective)
    encode = objective.encoder.forward

    def encode_in_turn(clips, masks=None, **arguments):
        if isinstance(masks, list):
            return [encode(clips, mask, **arguments) for mask in masks]
        return encode(clips, masks, **arguments)

    objective.encoder.forward = encode_in_turn
    objective.predictor.packs_masks = False
    return objective


def compiled(objective, backend):
    objective = copy.deepcopy(objective)
    for part in objective.parts().values():
        compile_blocks(part, backend)
    return objective


def make_batch(step, masks=3):
    """A batch with masks whose lengths depend on the step."""
    generator = torch.Generator().manual_seed(step)
    contexts, targets = [], []
    for _ in range(masks):
        order = torch.stack([torch.randperm(TOKENS, generator=generator) for _ in range(BATCH)])
        seen, hidden = torch.randint(5, 30, (2,), generator=generator).tolist()
        contexts.append(order[:, :seen].sort().values)
        targets.append(order[:, -hidden:].sort().values)
    clips = torch.randint(256, (BATCH, 3, 8, 32, 32), generator=generator, dtype=torch.uint8)
    index = torch.arange(BATCH)
    return Batch({"clip": clips}, {}, index, ("",) * BATCH, index, step).with_masks(contexts, targets)


def losses_and_gradients(objective, batch):
    objective.zero_grad()
    terms = objective(batch, StepRng(seed=0, step=3, first_sample=0))
    terms["loss"].backward()
    return terms, {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


def assert_equal(objective, expected, batch):
    (terms, gradients), (true_terms, true_gradients) = (
        losses_and_gradients(each, batch) for each in (objective, expected)
    )
    assert terms.keys() == true_terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, true_terms[name], rtol=1e-6, atol=1e-7)
    assert gradients.keys() == true_gradients.keys()
    largest = max(gradient.abs().max() for gradient in true_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, true_gradients[name], rtol=0, atol=1e-5 * float(largest), msg=name)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_mask_at_a_time(case):
    objective = make_objective(case)
    assert_equal(objective, one_mask_at_a_time(objective), make_batch(0))


def test_layers_compute_all_masks_at_once():
    objective, calls = make_objective("sin-cos"), []
    for part in (objective.encoder.blocks[0].mlp, objective.predictor.predictor_blocks[0].mlp):
        part.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
    batch = make_batch(0)
    objective(batch, StepRng(0, 0, 0))
    seen, hidden = (sum(mask.shape[1] for mask in masks) for masks in (batch.masks_context, batch.masks_target))
    assert calls == [seen, seen + hidden]


@pytest.mark.parametrize("case", ["rotary", "block-causal", "levels"])
def test_blocks_are_compiled_once_for_all_lengths(case):
    torch._dynamo.reset()
    counters.clear()
    objective = make_objective(case)
    faster, graphs = compiled(objective, "eager"), []
    assert faster.state_dict().keys() == objective.state_dict().keys()
    for step in range(5):
        assert_equal(faster, objective, make_batch(step, masks=2))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] <= 8
    assert graphs[0] == graphs[-1]
    assert not counters["graph_break"]


def test_compiled_blocks_with_checkpointing():
    torch._dynamo.reset()
    objective = make_objective("checkpointing")
    assert_equal(compiled(objective, "eager"), objective, make_batch(0))
