"""Every word that `--devices` accepts, and what must be set before CUDA is used."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.processes import run as run_on_processes
from tubelet.config import ConfigError
from tubelet.runtime import devices, distributed, launch
from tubelet.runtime.distributed import World

REFUSED = r"expected cpu, cuda \(the first GPU\), or cuda:0 cuda:1 … with spaces between them"


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("cpu", ["cpu"]),
        ("cpu cpu", ["cpu", "cpu"]),
        ("cuda", ["cuda:0"]),
        ("cuda:1", ["cuda:1"]),
        ("cuda:0 cuda:1", ["cuda:0", "cuda:1"]),
        ("cuda cuda:1", ["cuda:0", "cuda:1"]),
    ],
)
def test_words_of_the_command_line(words, expected, two_gpus):
    arguments = launch._parse_arguments(
        launch.Package("app", "app", "train"), ["--fname", "x.yaml", "--devices", *words.split()]
    )
    assert launch._devices(arguments) == expected


def test_the_default_is_the_first_gpu_where_there_is_one(monkeypatch, two_gpus):
    arguments = launch._parse_arguments(launch.Package("app", "app", "train"), ["--fname", "x.yaml"])
    assert launch._devices(arguments) == ["cuda:0"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch._devices(arguments) == ["cpu"]


@pytest.mark.parametrize(
    "word", ["cuda0", "cuda:", "cuda:-1", "cuda:01", "cuda:0,cuda:1", "cuda:x", "0", "CUDA", "gpu", "mps", ""]
)
def test_other_words_are_refused_with_the_valid_forms(word, two_gpus):
    with pytest.raises(ConfigError, match=f"--devices {word}: {REFUSED}"):
        devices.parse([word])
    with pytest.raises(ConfigError, match=f"--device {word}: {REFUSED}"):
        devices.parse([word], "--device")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cuda:2", r"--devices cuda:2: this machine has 2 CUDA device\(s\)"),
        ("cuda:1 cuda:1", "--devices cuda:1 cuda:1: cuda:1 is named twice; name one GPU for each process"),
        ("cuda cuda:0", "--devices cuda cuda:0: cuda:0 is named twice"),
        ("cpu cuda:0", "--devices cpu cuda:0: CPU and GPUs cannot train together"),
    ],
)
def test_devices_that_cannot_be_used_are_refused(words, message, two_gpus):
    with pytest.raises(ConfigError, match=message):
        devices.parse(words.split())


def test_a_machine_without_gpus_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"--devices cuda: this machine has 0 CUDA device\(s\)"):
        devices.parse(["cuda"])


def join_with_pretended_gpus(gpus, world):
    """Join as a process on a GPU does, up to the group itself."""
    joined = []
    distributed._gpu_name = lambda device: gpus[device.index]
    distributed.expand_segments = lambda: None
    torch.cuda.set_device = joined.append
    dist.init_process_group = lambda backend, **options: joined.append((backend, options["device_id"]))
    address = world.broadcast_from_rank0(distributed.free_address)
    device = torch.device("cuda", world.rank)
    if gpus[0] == gpus[1]:
        with pytest.raises(
            ConfigError, match="the processes 0 and 1 share the GPU A of host; start one process for each"
        ):
            distributed.init(world.rank, 2, str(device), address)
        assert joined == [device]
    else:
        assert distributed.init(world.rank, 2, str(device), address) == World(world.rank, 2, device)
        assert joined == [device, ("cpu:gloo,cuda:nccl", device)]


@pytest.mark.parametrize("gpus", [("A of host", "B of host"), ("A of host", "A of host")])
def test_processes_that_share_a_gpu_are_refused_before_nccl_starts(gpus):
    run_on_processes(join_with_pretended_gpus, gpus, 2)


def test_a_gpu_without_index_is_the_first(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "expand_segments", lambda: None)
    assert distributed.init(0, 1, "cuda", "").device == torch.device("cuda:0")
    assert chosen == [torch.device("cuda:0")]


def allocator_settings(given, world):
    """In a new process, as torch reads them once."""
    variables, expected = given
    for name in devices.ALLOCATOR_SETTINGS:
        os.environ.pop(name, None)
    os.environ.update(variables)
    devices.expand_segments()
    assert torch._C._accelerator_getAllocatorSettings() == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
)
def test_segments_of_the_allocator_expand_unless_the_user_has_set_it_up(variables, expected):
    run_on_processes(allocator_settings, (variables, expected), 1)


def deterministic(_, world):
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    devices.make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_deterministic_algorithms():
    run_on_processes(deterministic, None, 1)
