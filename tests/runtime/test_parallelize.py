"""FSDP2: how often parameters are gathered, and groups of processes with a copy of the model each."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.processes import run
from tubelet.config import ConfigError
from tubelet.data import Batch
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.objectives.vjepa import VJEPA, Options
from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointState
from tubelet.runtime.checkpoint_writer import Saver
from tubelet.runtime.distributed import World
from tubelet.runtime.parallelize import DistributedConfig, blocks_of, model_state, parallelize
from tubelet.training.objective import StepRng
from tubelet.training.optimizer import adamw, clip_gradients

SIZES = {"img_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
STEPS, BATCH = 3, 8


def make_vjepa(depth, pred_depth):
    torch.manual_seed(0)
    encoder = VisionTransformer(**SIZES, embed_dim=12, depth=depth, num_heads=1)
    predictor = VisionTransformerPredictor(
        **SIZES, embed_dim=12, predictor_embed_dim=12, depth=pred_depth, num_heads=1, use_mask_tokens=True
    )
    return VJEPA(encoder, predictor, Options())


def make_batch(step, world):
    rows = slice(world.rank * BATCH // world.world_size, (world.rank + 1) * BATCH // world.world_size)
    generator = torch.Generator().manual_seed(step)
    clips = torch.randint(256, (BATCH, 3, 4, 16, 16), generator=generator, dtype=torch.uint8)[rows]
    masks = [torch.stack([torch.randperm(8, generator=generator) for _ in range(BATCH)])[rows] for _ in range(2)]
    contexts, targets = [masks[0][:, :3], masks[1][:, :5]], [masks[0][:, 4:], masks[1][:, 6:]]
    index = torch.arange(len(clips))
    batch = Batch({"clip": clips}, {}, index, ("",) * len(clips), index, step)
    return batch.with_masks(contexts, targets)


def train(objective, model, world):
    """Take steps; return the mean losses over the processes."""
    optimizer = adamw([objective.encoder, objective.predictor], lr=1e-2, weight_decay=0.04)
    losses = []
    for step in range(STEPS):
        loss = model(make_batch(step, world), StepRng(0, step, 0))["loss"]
        loss.backward()
        clip_gradients([[p for group in optimizer.param_groups for p in group["params"]]], 0.1)
        optimizer.step()
        optimizer.zero_grad()
        objective.on_update(step)
        losses.append(float(world.mean(loss.detach())))
    return losses


def sharded(config, world, depth=3, pred_depth=2):
    objective = make_vjepa(depth, pred_depth)
    return objective, parallelize(objective, list(objective.parts().values()), config, world, torch.float32)


def count_all_gathers(limits, world):
    for reshard_after_forward, limit in limits.items():
        config = DistributedConfig(kind="fsdp", reshard_after_forward=reshard_after_forward)
        objective, model = sharded(config, world, depth=6, pred_depth=3)
        with CommDebugMode() as communication:
            model(make_batch(0, world), StepRng(0, 0, 0))["loss"].backward()
        counts = {str(name): count for name, count in communication.get_comm_counts().items()}
        assert 15 < sum(count for name, count in counts.items() if "gather" in name) <= limit, counts
        assert all(isinstance(parameter, DTensor) for parameter in objective.parameters())


def test_number_of_all_gathers_of_a_step():
    """6 blocks and their encoder's own layers, twice, and 3 blocks and theirs. Not once for each mask."""
    run(count_all_gathers, {False: 18, True: 29}, 2)


def everything_is_sharded_after_a_forward_pass_without_gradients(_, world):
    objective, _ = sharded(DistributedConfig(kind="fsdp"), world)
    with torch.no_grad():
        objective.encoder(torch.zeros(1, 3, 4, 16, 16))
    assert all(isinstance(parameter, DTensor) for parameter in objective.parameters())


def test_parameters_are_shards_after_a_forward_pass_without_gradients():
    run(everything_is_sharded_after_a_forward_pass_without_gradients, None, 2)


def compare_with_one_process(arguments, world):
    config, expected, folder = arguments
    objective, model = sharded(config, world)
    assert train(objective, model, world) == pytest.approx(expected, rel=1e-5)
    writer = Saver(folder, 1, world, sharded=True)
    writer.start(STEPS, lambda: CheckpointState({"encoder": model_state(objective.encoder)}, None, {"step": STEPS}))
    writer.finish()


@pytest.mark.parametrize(
    "options", [{}, {"reshard_after_forward": True}, {"shard_size": 2}], ids=lambda options: str(options)
)
def test_losses_and_weights_are_those_of_one_process(tmp_path, options):
    straight = make_vjepa(3, 2)
    expected = train(straight, straight, World())
    run(compare_with_one_process, (DistributedConfig(kind="fsdp", **options), expected, tmp_path), 4)
    weights = checkpoint.read_weights(checkpoint.newest(tmp_path))["encoder"]
    for name, weight in straight.encoder.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)


def refuses_the_size(config, world):
    with pytest.raises(ConfigError, match="distributed.shard_size: 3 does not divide the 2 processes"):
        sharded(config, world)


def test_a_shard_size_that_does_not_divide_the_processes_is_refused():
    run(refuses_the_size, DistributedConfig(kind="fsdp", shard_size=3), 2)
    with pytest.raises(ValueError, match="shard_size requires kind: fsdp"):
        DistributedConfig(shard_size=2)


def test_blocks_are_not_single_layers():
    encoder = VisionTransformer(**SIZES, embed_dim=12, depth=4, num_heads=1, levels=2)
    assert list(blocks_of(encoder)) == [list(encoder.blocks)]
