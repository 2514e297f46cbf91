"""Counts of the pretended GPU; skipped where it cannot be built."""

from pathlib import Path

import pytest

from benchmarks import costs, noise
from benchmarks.gpu import steps
from tools.pretended_gpu import __main__ as tool
from tools.pretended_gpu.build import CannotBuild, build
from tubelet.runtime.distributed import World

ROOT = Path(__file__).parents[2]
SMALL = ["data.datasets=[noise]", "data.batch_size=16", "encoder.depth=6", "objective.predictor.depth=2"]
pytestmark = pytest.mark.slow


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        build()
    except CannotBuild as error:
        pytest.skip(str(error))

    def run(*arguments):
        parsed = tool._parser().parse_intermixed_args(["--fname", "configs/pretrain/vitb16.yaml", *arguments, *SMALL])
        return tool.measure(parsed)

    return run


@pytest.mark.parametrize(
    "sharding",
    [None, {"reshard_after_forward": False}, {"reshard_after_forward": True}],
    ids=["one GPU", "kept weights", "resharded weights"],
)
def test_a_step_waits_for_nothing_and_its_memory_is_that_of_the_plan(sharding, measure, tmp_path):
    arguments, strategy = [], costs.Strategy(False, False, 1, 2)
    if sharding is not None:
        arguments = ["--world-size", "8", "distributed.kind=fsdp"]
        arguments += [f"distributed.{key}={str(value).lower()}" for key, value in sharding.items()]
        strategy = costs.Strategy(True, False, 8, 2, **sharding)
    counts = measure("--allocator", "expandable_segments:True", *arguments)
    assert counts["waits"] == []
    assert counts["per_step"]["launches"] > counts["per_step"]["matrix product"] > 6 * 3 * 4
    options = noise.read_options("configs/pretrain/vitb16.yaml", SMALL, str(tmp_path))
    jepa, expected = steps.on_meta(options), []
    for batch in noise.batches(options, World(0, strategy.world_size), 4):
        pairs = zip(batch.masks_context, batch.masks_target, strict=True)
        tokens = [costs.Tokens(context.shape[1], target.shape[1]) for context, target in pairs]
        rows = costs.memory(jepa, strategy, batch.num_clips, 1, costs.FP32 * batch.clips[0].numel(), tokens)
        expected.append(sum(rows.values()) / 2**30)
    memory = counts["memory"]
    assert memory["peak allocated"] == pytest.approx(max(expected[1:]), rel=0.1)
    if sharding is None:  # FSDP reserves more
        assert memory["peak reserved"] <= 1.05 * memory["peak allocated"]


def test_fsdp_gathers_each_unit(measure):
    counts = measure("--world-size", "8", "--steps", "1", "distributed=fsdp")
    blocks = 6 + 6 + 2  # encoder, target encoder, predictor
    assert counts["collectives"]["_allgather_base_"] >= blocks
    assert counts["waits"] == []
