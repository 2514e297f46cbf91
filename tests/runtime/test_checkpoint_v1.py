"""Version 0.1's checkpoints are read like those of today, and a folder with both continues."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.runtime.checkpoints_v1 import write_file, write_folder
from tests.runtime.test_checkpoint import assert_same, damage, names
from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointError, CheckpointState

CONFIG = {"model": {"model_name": "vit_tiny"}, "data": {"crop_size": 32}, "betas": [0.9, 0.95]}


def trained(steps=2):
    """A model, its moving average and an optimizer with some history."""
    torch.manual_seed(0)
    model, average = torch.nn.Linear(32, 40), torch.nn.Linear(32, 40)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for _ in range(steps):
        model(torch.randn(5, 32)).square().mean().backward()
        optimizer.step()
    return model, average, optimizer


def by_name(optimizer):
    """The optimizer's state by names of parameters, as pretraining saved it."""
    state = optimizer.state_dict()
    names = ["encoder.weight", "encoder.bias"]
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[i]: moments for i, moments in state["state"].items()}, "param_groups": groups}


def pretraining(step=3):
    model, average, optimizer = trained()
    return {
        "step": step,
        "encoder": model.state_dict(),
        "target_encoder": average.state_dict(),
        "predictor": average.bfloat16().state_dict(),
        "optimizer": by_name(optimizer),
        "global_batch": 8,
        "scaler": {},
        "config": CONFIG,
    }


@pytest.fixture(params=[write_file, write_folder])
def write(request):
    return request.param


def test_pretraining(tmp_path, write):
    content = pretraining()
    path = write(tmp_path, content)
    checkpoint.check_intact(path)
    assert checkpoint.newest(tmp_path) == path
    for name in (path, tmp_path / "latest.pt"):
        state = checkpoint.read(name)
        assert state.weights.keys() == {"encoder", "target_encoder", "predictor"}
        for part, tensors in state.weights.items():
            assert_same(dict(tensors), dict(content[part]))
        assert_same(state.optimizer["state"], content["optimizer"]["state"])
        assert_same(state.optimizer["param_groups"], content["optimizer"]["param_groups"])
        assert state.metadata == {"step": 3, "global_batch": 8, "scaler": {}, "config": CONFIG}
        assert checkpoint.parts(name) == list(state.weights)
        assert checkpoint.read_weights(name, ["predictor"]).keys() == {"predictor"}


def test_classification(tmp_path):
    model, head, optimizer = trained()
    content = {
        "step": 5,
        "encoder": model.state_dict(),
        "config": CONFIG,
        "classifier": head.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "sums": torch.tensor([0.1, 2.0, 3.0]),
        "excluded": {"a.mp4": "no video"},
        "global_batch": 4,
        "lists": "abc",
    }
    state = checkpoint.read(write_file(tmp_path, content))
    assert state.weights.keys() == {"encoder", "classifier"}
    assert_same(state.optimizer, content["optimizer"])
    optimizer.load_state_dict(state.optimizer)
    metadata = {key: content[key] for key in ("step", "config", "scaler", "excluded", "global_batch", "lists")}
    sums = state.metadata.pop("sums")
    assert state.metadata == metadata
    assert torch.equal(torch.tensor(sums), content["sums"])


@pytest.mark.parametrize("frozen", [None, "0123"])
def test_generation(tmp_path, frozen):
    model, _, optimizer = trained()
    content = {"step": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}}
    state = checkpoint.read(write_file(tmp_path, {**content, "global_batch": 2, "frozen": frozen, "config": CONFIG}))
    assert_same(dict(state.weights["model"]), dict(content["model"]))
    assert state.metadata == {"step": 1, "scaler": {}, "global_batch": 2, "frozen": frozen, "config": CONFIG}


def test_probe(tmp_path):
    heads, _, optimizer = trained()
    content = {"step": 4, "sums": torch.zeros(2, 3), "seen": 7, "heads": heads.state_dict(), "inputs": "abc"}
    content |= {"optimizers": [optimizer.state_dict()], "excluded": {}, "global_batch": 2}
    state = checkpoint.read(write_file(tmp_path, content))
    assert_same(dict(state.weights["heads"]), dict(content["heads"]))
    assert_same(state.optimizer, {"optimizers": content["optimizers"]})
    assert state.metadata["sums"] == [[0.0] * 3] * 2


def test_optimizer_state_comes_back_as_it_does_from_the_present_format(tmp_path):
    content = pretraining()
    old = checkpoint.read(write_file(tmp_path / "old", content))
    new = checkpoint.read(checkpoint.save(tmp_path / "new", 3, old, keep=1))
    assert_same(new.optimizer, old.optimizer)
    assert new.metadata == old.metadata
    for part in old.weights:
        assert_same(dict(new.weights[part]), dict(old.weights[part]))


def test_a_run_continues_in_the_present_format(tmp_path, write):
    first = write(tmp_path, pretraining(3))
    assert checkpoint.locate(tmp_path / "latest") == first
    second = checkpoint.save(tmp_path, 6, checkpoint.read(first), keep=2)
    assert checkpoint.find(tmp_path) == [first, second]
    assert checkpoint.newest(tmp_path) == checkpoint.locate(tmp_path / "latest.pt") == second
    third = checkpoint.save(tmp_path, 9, checkpoint.read(second), keep=2)
    assert names(tmp_path) == ["latest", second.name, third.name]
    assert_same(dict(checkpoint.read(third).weights["encoder"]), dict(pretraining()["encoder"]))


@pytest.mark.parametrize("how", ["cut", "empty", 0.5])
def test_damaged_file_falls_back(tmp_path, caplog, how):
    first = write_file(tmp_path, pretraining(3))
    damage(write_file(tmp_path, pretraining(6)), how)
    assert checkpoint.newest(tmp_path) == first
    assert "step-00000006.pt: damaged" in caplog.text
    assert (tmp_path / "step-00000006.pt.damaged").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rest.pt"])
@pytest.mark.parametrize("how", ["cut", "empty", "missing"])
def test_damaged_folder_falls_back(tmp_path, name, how):
    first = write_file(tmp_path, pretraining(3))
    damage(write_folder(tmp_path, pretraining(6)) / name, how)
    assert checkpoint.newest(tmp_path) == first
    assert (tmp_path / "step-00000006.dcp.damaged").exists()


def test_all_damaged_is_an_error(tmp_path, write):
    path = write(tmp_path, pretraining())
    damage(path if path.is_file() else path / ".metadata", "empty")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="all checkpoints are damaged"):
            checkpoint.newest(tmp_path)


def test_metadata_is_read_without_the_weights(tmp_path):
    path = write_folder(tmp_path, pretraining())
    (path / "__0_0.distcp").unlink()
    assert checkpoint.read_metadata(path)["config"] == CONFIG


class Harmful:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.fixture(params=["open", "eval", "dataclass with a side effect"])
def harmful(request, tmp_path):
    """An object whose unpickling would leave a file behind."""
    target = str(tmp_path / "touched")
    return {
        "open": Harmful((open, (target, "w"))),
        "eval": Harmful((eval, (f"open({target!r}, 'w')",))),
        "dataclass with a side effect": Harmful((dcp.FileSystemWriter(tmp_path).fs.mkdir, (target,))),
    }[request.param]


def test_no_code_of_a_file_is_executed(tmp_path, harmful):
    path = write_file(tmp_path / "checkpoints", {**pretraining(), "x": harmful})
    for read in (checkpoint.read, checkpoint.read_metadata, checkpoint.parts):
        with pytest.raises(CheckpointError):
            read(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("file", [".metadata", "rest.pt"])
def test_no_code_of_a_folder_is_executed(tmp_path, harmful, file):
    path = write_folder(tmp_path / "checkpoints", pretraining())
    (path / file).unlink()
    with open(path / file, "wb") as stream:
        (torch.save if file == "rest.pt" else pickle.dump)(harmful, stream)
    with pytest.raises(CheckpointError):
        checkpoint.read(path)
    assert not (tmp_path / "touched").exists()


def test_the_index_of_a_folder_may_not_reach_other_modules(tmp_path):
    """Protocol 4 takes dotted names: torch.distributed.checkpoint.filesystem imports os."""
    path = write_folder(tmp_path / "checkpoints", pretraining())
    module, name = "torch.distributed.checkpoint.filesystem", "os.system"
    call = f"touch {tmp_path / 'touched'}"

    def text(value):
        return b"\x8c" + bytes([len(value)]) + value.encode()

    (path / ".metadata").write_bytes(b"\x80\x04" + text(module) + text(name) + b"\x93" + text(call) + b"\x85R.")
    with pytest.raises(CheckpointError, match="not allowed"):
        checkpoint.check_intact(path)
    assert not (tmp_path / "touched").exists()


def test_files_without_a_run_have_weights_only(tmp_path):
    """As released by others: unknown entries are neither weights nor metadata unless they are plain."""
    content = {"encoder": {"w": torch.ones(2)}, "opt": {"state": {0: torch.ones(3)}}, "epoch": 3, "scaler": None}
    torch.save(content | {"list": [torch.ones(1)]}, tmp_path / "a.pth.tar")
    assert checkpoint.read(tmp_path / "a.pth.tar") == CheckpointState(
        {"encoder": {"w": pytest.approx(torch.ones(2))}}, None, {"epoch": 3, "scaler": None}
    )
