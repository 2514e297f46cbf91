"""The guard finds every kind of wait, and lets pass what does not wait."""

import pytest
import torch

from tests.gpu_guards.fake_cuda import fake_cuda
from tests.processes import run as run_on_processes
from tubelet.runtime.transfer import to_device

LARGE = 2**15

WAITS = {
    "reads the device": (
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
    ),
    "copy to the host": (lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: torch.zeros(4).copy_(x)),
    "blocking copy to the device": (
        lambda x: torch.zeros(4).to("cuda"),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: x.copy_(torch.zeros(4)),
    ),
    "not pinned": (lambda x: torch.zeros(LARGE).to("cuda", non_blocking=True),),
    "an index on the host": (lambda x: x[torch.tensor([0, 2])],),
}

PASSES = (
    lambda x: x * 2 + x.sum(),
    lambda x: x[1:3],
    lambda x: x[torch.arange(2, device="cuda")],
    lambda x: x.masked_fill(x > 0, 0.0),
    lambda x: torch.zeros(LARGE).pin_memory()[1:].to("cuda", non_blocking=True),
    lambda x: torch.zeros(4).to("cuda", non_blocking=True),
    lambda x: to_device(torch.zeros(LARGE), "cuda"),
)


def check(_, world):
    with fake_cuda() as device:
        x = torch.ones(4, device="cuda")
        for expected, actions in WAITS.items():
            for number, action in enumerate(actions):
                device.clear()
                action(x)
                assert any(expected in what for what, _ in device.waits), (expected, number)
        device.clear()
        with pytest.raises(Exception, match="nonzero"):  # its size depends on values
            x[x > 0]
        assert any("counted on the device" in what for what, _ in device.waits)
        for number, action in enumerate(PASSES):
            device.clear()
            action(x)
            assert not device.waits, number
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(4)


def test_every_kind_of_wait_is_found():
    run_on_processes(check, None, 1)
