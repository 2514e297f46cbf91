"""Time and memory of attention mechanisms as a function of the number of tokens, and speed against other packages.

    python -m benchmarks attention

Writes attention_speed.svg. The packages timesformer-pytorch and performer-pytorch are optional; their rows are skipped
if they are not installed. timesformer-pytorch is compared with softmax and additive attention, performer-pytorch with
Performer. On a CPU FlexAttention supports the forward pass only and needs a C++ compiler.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.harness import Row, Timing, seconds, time_alternately
from tubelet.grid import Grid
from tubelet.layers.groups import Groups
from tubelet.layers.mixing import MECHANISMS, PerformerAttention
from tubelet.models.fast_timesformer import FastTimeSformer
from tubelet.models.fastback import BidirectionalTemporalAttention
from tubelet.models.sparse import SparseTransformer
from tubelet.models.windowed import WindowedTransformer
from tubelet.report.figures import to_svg

WIDTH, HEADS, PATCH = 128, 4, 16
# Number of frames and frame size in pixels: from 64 to 65,536 tokens.
CLIPS = ((4, 64), (16, 64), (16, 128), (32, 128), (16, 256), (32, 256), (16, 512), (32, 512), (64, 512))
FIT_RANGE = (1_000, 33_000)  # numbers of tokens for which the exponent is fitted
# Masked attention stores a mask with one byte for each pair of tokens.
MAX_MASKED_TOKENS = 16_384

# An attention layer for a fixed token grid: [1, N, WIDTH] -> [1, N, WIDTH].
Layer = Callable[[Tensor], Tensor]


@dataclass
class Curve:
    """Medians for each clip size: number of tokens, seconds and peak bytes of a forward and a forward-backward pass."""

    tokens: list[int] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    forward_bytes: list[int] = field(default_factory=list)
    backward_bytes: list[int] = field(default_factory=list)


def run(repeats: int = 5, clips: Sequence[tuple[int, int]] = CLIPS, plot: str = "attention_speed.svg") -> list[Row]:
    """Measure and plot the curves, then compare with other implementations."""
    curves = measure(clips, repeats)
    draw(curves, plot)
    print(f"wrote {plot}")
    rows = [row for name, curve in curves.items() for row in curve_rows(name, curve)]
    return rows + against_regular(repeats) + against_peers(repeats) + fastback_rows(repeats)


def joint(mechanism: str, grid: Grid) -> Layer:
    """Joint space-time attention."""
    return MECHANISMS[mechanism](WIDTH, HEADS).to(device())


def divided(mechanism: str, grid: Grid) -> Layer:
    """Divided attention: over time, then over space."""
    layers = nn.ModuleList(MECHANISMS[mechanism](WIDTH, HEADS) for _ in range(2)).to(device())
    return lambda x: layers[1](layers[0](x, groups=Groups(grid, "time")), groups=Groups(grid, "space"))


def patterned(encoder: type[SparseTransformer], grid: Grid) -> Layer:
    """The attention of the first block of a sparse encoder with its default pattern."""
    t, h, w = grid
    sizes = {"patch_size": PATCH, "num_frames": t, "tubelet_size": 1, "embed_dim": WIDTH, "num_heads": HEADS}
    model = encoder((h * PATCH, w * PATCH), depth=1, **sizes).to(device())
    attend = model.attention_fn(model.patterns[0], None, grid, model.norm.weight.device)
    return lambda x: model.blocks[0].attn(x, None, attend)


LAYERS: dict[str, Callable[[Grid], Layer]] = {
    **{f"{mechanism}, joint": partial(joint, mechanism) for mechanism in MECHANISMS},
    **{f"{mechanism}, divided": partial(divided, mechanism) for mechanism in MECHANISMS},
    "windowed": partial(patterned, WindowedTransformer),
    "sparse": partial(patterned, SparseTransformer),
}


def measure(clips: Sequence[tuple[int, int]], repeats: int, patience: float = 2.0) -> dict[str, Curve]:
    """Measure all LAYERS alternately for each clip size.

    Args:
        clips: Number of frames and frame size of each clip.
        repeats: Timed passes for each layer and clip.
        patience: Skip a layer if its forward pass would exceed this many seconds, assuming quadratic growth. Masked
            layers are also skipped if their mask would be too large.

    Returns:
        The curve of each layer.
    """
    curves = {name: Curve() for name in LAYERS}
    for frames, size in clips:
        grid = Grid(frames, size // PATCH, size // PATCH)
        tokens = math.prod(grid)
        x = torch.randn(1, tokens, WIDTH, device=device())
        layers = {}
        for name, build in LAYERS.items():
            if _next_forward(curves[name], tokens) <= patience and (name != "sparse" or tokens <= MAX_MASKED_TOKENS):
                layers[name] = build(grid)
        timings: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
        for layer in layers.values():
            _forward_backward(layer, x)
        for _ in range(repeats):
            for name, layer in layers.items():
                times = seconds(partial(_forward, layer, x)), seconds(partial(_forward_backward, layer, x))
                timings[name].append(times)
        for name, layer in layers.items():
            forward, backward = (statistics.median(times) for times in zip(*timings[name], strict=True))
            curve = curves[name]
            curve.tokens.append(tokens)
            curve.forward.append(forward)
            curve.backward.append(backward)
            curve.forward_bytes.append(peak_bytes(partial(_forward, layer, x)))
            curve.backward_bytes.append(peak_bytes(partial(_forward_backward, layer, x)))
    return curves


def exponent(curve: Curve, values: Sequence[float]) -> float | None:
    """Fit the slope of log(value) over log(tokens) within FIT_RANGE; None for fewer than two points."""
    points = [(n, v) for n, v in zip(curve.tokens, values, strict=True) if FIT_RANGE[0] <= n <= FIT_RANGE[1]]
    if len(points) < 2:
        return None
    tokens, fitted = np.log(points).T
    return float(np.polyfit(tokens, fitted, 1)[0])


def curve_rows(name: str, curve: Curve) -> list[Row]:
    """Return a row for each clip size, and one with the exponent."""
    columns = (curve.tokens, curve.forward, curve.backward, curve.forward_bytes, curve.backward_bytes)
    rows = [
        Row(
            f"attention, {name}, {tokens} tokens",
            f"{forward * 1e3:.1f} ms, with backward {backward * 1e3:.1f} ms; "
            f"{forward_bytes / 2**20:.1f} MiB, with backward {backward_bytes / 2**20:.1f} MiB",
        )
        for tokens, forward, backward, forward_bytes, backward_bytes in zip(*columns, strict=True)
    ]
    slope = exponent(curve, curve.forward)
    if slope is not None:
        goal = ""
        if name in ("fastformer, joint", "performer, joint"):
            goal = f"; goal at most 1.15: {'reached' if slope <= 1.15 else 'MISSED'}"
        rows.append(Row(f"attention, {name}, exponent of the forward time", f"{slope:.2f}{goal}"))
    return rows


def draw(curves: dict[str, Curve], path: str) -> None:
    """Plot time and memory over tokens, log-log; the legend shows the exponents of the forward pass."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, label, forward, backward, unit in (
        (panels[0], "milliseconds", "forward", "backward", 1e-3),
        (panels[1], "peak MiB", "forward_bytes", "backward_bytes", 2**20),
    ):
        for name, curve in curves.items():
            values = np.array(getattr(curve, forward)) / unit
            slope = exponent(curve, values)
            legend = name if slope is None else f"{name}: N^{slope:.2f}"
            (line,) = axes.plot(curve.tokens, values, marker="o", label=legend)
            axes.plot(curve.tokens, np.array(getattr(curve, backward)) / unit, "--", color=line.get_color())
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_title("forward (solid), forward and backward (dashed)")
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize="small")
    Path(path).write_text(to_svg(figure), encoding="utf-8")


def against_regular(repeats: int) -> list[Row]:
    """Compare joint Fastformer and Performer attention with softmax attention (forward pass)."""
    rows = []
    for grid in (Grid(16, 16, 16), Grid(16, 32, 32)):
        x = torch.randn(1, math.prod(grid), WIDTH, device=device())
        regular = partial(_forward, joint("regular", grid), x)
        for mechanism in ("fastformer", "performer"):
            timing = time_alternately(partial(_forward, joint(mechanism, grid), x), regular, repeats)
            rows.append(_comparison(f"{mechanism} against regular, {math.prod(grid)} tokens", timing, goal=1.0))
    return rows


def against_peers(repeats: int) -> list[Row]:
    """Compare with the two packages, if installed (forward pass)."""
    rows = []
    if find_spec("performer_pytorch"):
        from performer_pytorch import SelfAttention

        x = torch.randn(1, 4096, WIDTH, device=device())
        ours = PerformerAttention(WIDTH, HEADS).to(device())
        peer = SelfAttention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, nb_features=len(ours.features)).to(device())
        timing = time_alternately(partial(_forward, ours, x), partial(_forward, peer, x), repeats)
        rows.append(_comparison("performer-pytorch, 4096 tokens", timing, goal=1.5))
    if find_spec("timesformer_pytorch"):
        for size in (128, 256):
            rows += against_timesformer(frames=16, size=size, depth=2, repeats=repeats)
    return rows


def against_timesformer(frames: int, size: int, depth: int, repeats: int) -> list[Row]:
    """Compare softmax and additive attention with timesformer-pytorch, for two clips."""
    from timesformer_pytorch import TimeSformer

    x = torch.randn(2, frames, 3, size, size, device=device())
    peer = TimeSformer(
        dim=WIDTH,
        num_frames=frames,
        num_classes=10,
        image_size=size,
        patch_size=PATCH,
        depth=depth,
        heads=HEADS,
        dim_head=WIDTH // HEADS,
        rotary_emb=True,
    ).to(device())
    rows = []
    for mechanism in ("regular", "fastformer"):
        ours = FastTimeSformer(
            frames, 3, size, size, 10, WIDTH, PATCH, depth=depth, num_heads=HEADS, attn_mechanism=mechanism
        ).to(device())
        timing = time_alternately(partial(_forward, ours, x), partial(_forward, peer, x), repeats)
        rows.append(_comparison(f"timesformer-pytorch against our {mechanism}, 2x{frames}x{size}", timing, goal=1.5))
    return rows


def fastback_rows(repeats: int) -> list[Row]:
    """Compare FastBack's attention with the same layer without a mask, for 8 clips of 16 frames of 64 patches.

    The goal is at most 1.1 times the time: with FlexAttention on a GPU, frame by frame on a CPU.
    """
    grid = Grid(16, 8, 8)
    layer = BidirectionalTemporalAttention(WIDTH, HEADS, HEADS // 2, HEADS // 2, frame_size=64).to(device())
    x = torch.randn(8, math.prod(grid), WIDTH, device=device())
    ours = partial(_forward, partial(layer, attend=layer.attention_fn(None, grid, x.device)), x)
    unmasked = partial(_forward, partial(layer, attend=nn.functional.scaled_dot_product_attention), x)
    timing = time_alternately(ours, unmasked, 4 * repeats)
    return [_comparison("FastBack against no mask, 8x16x64 tokens", timing, goal=1 / 1.1)]


class PeakMemory(TorchDispatchMode):
    """Track the bytes of all live tensors created by operations; `peak` is the maximum."""

    def __init__(self):
        super().__init__()
        self.alive = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak of additional tensor memory in bytes while `function` runs."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        function()
    return memory.peak


def device() -> str:
    """Return the device on which everything is measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _forward(layer: Layer, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)
    _synchronize()


def _forward_backward(layer: Layer, x: Tensor) -> None:
    layer(x.detach().requires_grad_()).sum().backward()
    _synchronize()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _next_forward(curve: Curve, tokens: int) -> float:
    """Extrapolate the seconds of a forward pass, assuming quadratic growth."""
    return curve.forward[-1] * (tokens / curve.tokens[-1]) ** 2 if curve.tokens else 0.0


def _comparison(name: str, timing: Timing, goal: float | None) -> Row:
    return Row(f"attention, {name}", f"{timing.ours * 1e3:.1f} ms", f"{timing.peer * 1e3:.1f} ms", timing.ratio, goal)
