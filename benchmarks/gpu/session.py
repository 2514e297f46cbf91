"""What a section gets: device, size and time left; and timing on either device."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import results
from benchmarks.gpu.results import Record
from tubelet.runtime.distributed import World

GIB = 2**30


@dataclass
class Session:
    """One section's run in its own process.

    Attributes:
        section: Name of the section.
        device: Where everything is measured.
        tiny: Tiny sizes, which only show that the code runs.
        deadline: Value of `time.monotonic` at which the process will be stopped.
        records: File of JSON lines to which measurements are appended.
        scratch: Folder for files that are not kept.
        out: Folder for files that are kept.
        failed: Whether a measurement has ended with an error.
    """

    section: str
    device: torch.device
    tiny: bool
    deadline: float
    records: Path
    scratch: Path
    out: Path
    failed: bool = False

    @property
    def world(self) -> World:
        return World(0, 1, self.device)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, name: str, **figures: Any) -> None:
        """Append a measurement and print it."""
        record = Record(self.section, name, **figures)
        results.append(self.records, record)
        shown = {key: value for key, value in vars(record).items() if value not in (None, "", {})}
        print(" ".join(f"{key}={value}" for key, value in shown.items() if key != "details"), flush=True)

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]], seconds: float = 0.0) -> None:
        """Record what `measure` returns, or why there is nothing: time, memory, a package, or any other error.

        A GPU is lent for minutes, so the section goes on after an error; `failed` makes its process exit with 1.

        Args:
            name: What is measured.
            measure: Returns the fields of a `Record`.
            seconds: Time that it takes about; not started with less.
        """
        if self.seconds_left < seconds:
            self.record(name, note=f"skipped: {self.seconds_left:.0f} s left, it takes about {seconds:.0f} s")
            return
        self.free_memory()
        try:
            figures = measure()
        except torch.cuda.OutOfMemoryError as error:
            figures = {"note": f"out of memory: {str(error).splitlines()[0]}"}
        except ModuleNotFoundError as error:
            figures = {"note": f"skipped: the package {error.name} is not installed"}
        except Exception as error:
            self.failed = True
            text = traceback.format_exc()
            print(text, flush=True)
            figures = {"note": f"failed: {type(error).__name__}: {error}"[:300], "details": {"error": text}}
        self.record(name, **figures)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free_memory(self) -> None:
        """Return all unused memory to the device and start new peaks."""
        if self.device.type == "cuda":
            gc.collect()  # of modules, whose hooks and closures form cycles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> dict[str, float]:
        """Return the peaks since `free_memory`; {} on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {
            "allocated_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved(self.device) / GIB,
        }

    def milliseconds(self, function: Callable[[], object]) -> float:
        """Time one call, until the device has finished."""
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3

    def median_milliseconds(self, function: Callable[[], object], calls: int, per_call: int = 1) -> float:
        """Return the median time of a call; each of the `calls` timings is the mean of `per_call` ones."""

        def several() -> None:
            for _ in range(per_call):
                function()

        return statistics.median(self.milliseconds(several) / per_call for _ in range(calls))

    def matrix_rate(self) -> float:
        """Measure the FLOP/s of products of two large bfloat16 matrices."""
        size, calls = (256, 2) if self.tiny else (8192, 10)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        self.milliseconds(lambda: [a @ b for _ in range(calls)])
        return 2 * size**3 / (self.median_milliseconds(lambda: a @ b, 5, calls) / 1e3)
