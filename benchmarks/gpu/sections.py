"""The sections of the benchmark, in the order in which they run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu import attention, demo, monitor, steps
from benchmarks.gpu.session import Session

VJEPA = "configs/pretrain/vjepa_vitl16.yaml"
VJEPA2 = "configs/pretrain/vjepa2_vitl16_256.yaml"


@dataclass(frozen=True)
class Section:
    """Part of the benchmark that runs in a process of its own.

    Attributes:
        run: Measures and records.
        least: Seconds without which it is not started.
        most: Seconds after which it is stopped.
    """

    run: Callable[[Session], None]
    least: float
    most: float


SECTIONS = {
    "matrix_rate": Section(steps.matrix_rate, 10, 40),
    "vjepa_vitl16": Section(partial(steps.eager, fname=VJEPA), 40, 90),
    "vjepa2_vitl16": Section(partial(steps.eager, fname=VJEPA2), 40, 90),
    "attention": Section(attention.new_lengths, 15, 60),
    "monitor": Section(partial(monitor.feature_monitor, fname=VJEPA), 20, 60),
    "fastback": Section(attention.fastback, 20, 60),
    "vjepa_vitl16_compiled": Section(partial(steps.compiled, fname=VJEPA), 45, 120),
    "vjepa2_vitl16_compiled": Section(partial(steps.compiled, fname=VJEPA2), 45, 120),
    "demo": Section(demo.demo, 90, 360),
}
