"""A sharded model's checkpoint, written by 2 processes and read by other numbers of them."""

import dataclasses
import errno
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.processes import run as run_on_processes
from tests.runtime.checkpoints_v1 import split
from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointState
from tubelet.runtime.checkpoint_writer import Saver
from tubelet.runtime.distributed import World
from tubelet.runtime.parallelize import full_tensor, load_optimizer_state, model_state, optimizer_state

WRITERS = 2


class Net(nn.Module):
    """Sizes that two and three processes share unevenly or not at all, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 1)
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.count += 1
        return self.last(self.first(x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.unused = Net(), Net()


def make(world):
    """A model, sharded where there are several processes, and its optimizer."""
    model = Model()
    if world.world_size > 1:
        for part in (model.encoder, model.unused):
            fully_shard(part, mesh=init_device_mesh("cpu", (world.world_size,)))
    return model, torch.optim.AdamW(model.encoder.parameters(), lr=0.1, betas=(0.8, 0.9))


def train(model, optimizer):
    for step in range(3):
        optimizer.zero_grad()
        model.encoder(torch.randn(4, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def state_of(model, optimizer):
    parts = {"encoder": model_state(model.encoder), "unused": model_state(model.unused)}
    return CheckpointState(parts, optimizer_state(model, optimizer), {"config": {"seed": 1}})


def full(value):
    """With full tensors in place of shards; all processes must call it."""
    if isinstance(value, torch.Tensor):
        return full_tensor(value).clone()
    if isinstance(value, dict):
        return {key: full(item) for key, item in value.items()}
    return [full(item) for item in value] if isinstance(value, list | tuple) else value  # torch turns tuples to lists


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_same(a[key], b[key])
        elif isinstance(a[key], torch.Tensor):
            assert a[key].dtype == b[key].dtype
            assert torch.equal(a[key], b[key]), key
        else:
            assert a[key] == b[key]


def write(folder, world):
    model, optimizer = make(world)
    train(model, optimizer)
    state = state_of(model, optimizer)
    expected = full(dataclasses.asdict(state) if world.world_size == 1 else vars(state))
    if world.is_main:
        torch.save(expected, folder / "expected.pt")
    saver = Saver(folder / "checkpoints", 2, world, sharded=True)
    saver.start(3, lambda: state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1)
    saver.finish()
    saver.close()


def write_v1(folder, world):
    """As version 0.1 did."""
    model, optimizer = make(world)
    train(model, optimizer)
    state = state_of(model, optimizer)
    expected = full(vars(state))
    tensors, rest = split({"step": 3, **state.weights, "optimizer": state.optimizer, **state.metadata})
    path = folder / "checkpoints" / "step-00000003.dcp"
    dcp.save(tensors, checkpoint_id=path)
    if world.is_main:
        torch.save(expected, folder / "expected.pt")
        torch.save(rest, path / "rest.pt")


def read(folder, world):
    """Into a new model; full tensors and shards are those that were written."""
    expected = torch.load(folder / "expected.pt", weights_only=True)
    expected["metadata"]["step"] = 3
    path = checkpoint.newest(folder / "checkpoints")
    model, optimizer = make(world)
    like = state_of(model, optimizer)
    state = checkpoint.read(path, like=like)
    if world.world_size > 1:
        for part, tensors in like.weights.items():
            for name, tensor in tensors.items():
                assert isinstance(state.weights[part][name], DTensor) == isinstance(tensor, DTensor), name
        assert isinstance(state.optimizer["state"]["encoder.first.weight"]["exp_avg"], DTensor)
    for part, module in (("encoder", model.encoder), ("unused", model.unused)):
        checkpoint.load_weights(module, state.weights[part], part)
    load_optimizer_state(model, optimizer, state.optimizer)
    assert_same(full(vars(state_of(model, optimizer))) | {"metadata": state.metadata}, expected)
    if world.is_main:
        assert_same(full(vars(checkpoint.read(path))), expected)


@pytest.fixture(scope="module", params=[write, write_v1])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_on_processes(request.param, folder, WRITERS)
    return folder


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_any_number_of_processes_reads_it(written, readers):
    run_on_processes(read, written, readers)


def test_each_process_writes_its_shards(tmp_path):
    run_on_processes(write, tmp_path, WRITERS)
    path = tmp_path / "checkpoints" / "step-00000003"
    expected = {f"{kind}-{i:05d}-of-00002.safetensors" for kind in ("weights", "optimizer") for i in (1, 2)}
    assert {file.name for file in path.iterdir()} == expected | {"optimizer.json", "metadata.json"}
    checkpoint.check_intact(path)
    (path / "weights-00002-of-00002.safetensors").unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match="weights-00002-of-00002.safetensors is missing"):
        checkpoint.check_intact(path)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="encoder.first.weight is incomplete"):
        checkpoint.read_weights(path)


def write_on_a_full_disk(folder, world):
    model, optimizer = make(world)
    saver = Saver(folder / "checkpoints", 2, world, sharded=True)
    saver.start(1, lambda: state_of(model, optimizer))
    saver.finish()
    fsync = os.fsync

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if world.rank == 1:
        os.fsync = full_disk
    saver.start(2, lambda: state_of(model, optimizer))
    with pytest.raises(checkpoint.CheckpointError, match="could not be written .*No space left"):
        saver.finish()
    os.fsync = fsync
    saver.start(3, lambda: state_of(model, optimizer))
    saver.finish()
    saver.close()


def test_a_disk_that_is_full_for_one_process_is_an_error_in_all(tmp_path):
    run_on_processes(write_on_a_full_disk, tmp_path, WRITERS)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000001", "step-00000003"]
    assert checkpoint.newest(folder) == folder / "step-00000003"


def test_a_tensor_of_another_shape_is_reported_and_not_cut_to_size(tmp_path):
    run_on_processes(write, tmp_path, WRITERS)
    run_on_processes(read_into_another_model, tmp_path, WRITERS)


def read_into_another_model(folder, world):
    model, _ = make(world)
    model.encoder.first = nn.Linear(4, 6)
    fully_shard(model.encoder.first, mesh=init_device_mesh("cpu", (world.world_size,)))
    weights = checkpoint.read_weights(
        folder / "checkpoints" / "latest", ["encoder"], {"encoder": model_state(model.encoder)}
    )
    with pytest.raises(checkpoint.CheckpointError, match=r"first.weight: \(5, 4\) in the file, \(6, 4\) in the model"):
        checkpoint.load_weights(model.encoder, weights["encoder"], "encoder")


def test_without_other_processes_it_is_written_as_one_file(tmp_path):
    write(tmp_path, World())
    assert (tmp_path / "checkpoints" / "step-00000003" / "weights.safetensors").is_file()
    read(tmp_path, World())
