"""The type that `meta.dtype` stands for, and the warning where bfloat16 is emulated."""

import logging

import pytest
import torch

from tubelet.runtime import precision

CPU = torch.device("cpu")


def test_x86_flags_agree_with_the_kernel():
    """An independent reading of the CPU's instructions."""
    flags = set()
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                flags |= set(line.partition(":")[2].split())
    if not flags:
        pytest.skip("the kernel names no flags")
    assert precision.has_bfloat16(CPU) == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


@pytest.mark.parametrize("native", [False, True])
def test_auto_is_bfloat16_only_where_the_cpu_has_it(native, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: native)
    assert precision.resolve("auto", CPU) == (torch.bfloat16 if native else torch.float32)
    assert [precision.resolve(name, CPU) for name in ("float32", "float16", "bfloat16")] == [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]


@pytest.mark.parametrize(("dtype", "native", "warns"), [
    (torch.bfloat16, False, True),
    (torch.bfloat16, True, False),
    (torch.float32, False, False),
])  # fmt: skip
def test_emulation_is_told_with_its_remedy(dtype, native, warns, monkeypatch, caplog):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: native)
    with caplog.at_level(logging.WARNING):
        precision.warn_if_emulated(dtype, CPU, "meta.dtype=auto")
    assert ("meta.dtype=auto" in caplog.text) == warns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_the_type(dtype):
    x = torch.ones(4, 4)
    with precision.autocast(CPU, dtype):
        assert (x @ x).dtype == dtype
