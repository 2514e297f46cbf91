"""Attention mechanisms over growing clips: time, memory and how both grow; and against peers of equal shapes.

    python -m benchmarks attention

Draws attention.png. The peers timesformer-pytorch and performer-pytorch are optional: their rows are left out where
they are not installed. Each is met by the mechanism it has: TimeSformer by softmax and additive attention, Performer by
Performer. FlexAttention runs forward only on a CPU, where it needs a C++ compiler.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.harness import Row, Timing, in_turn, seconds
from tubelet.layers.groups import Groups
from tubelet.layers.mixing import MECHANISMS, PerformerAttention
from tubelet.layers.positions import Grid
from tubelet.models.fast_timesformer import FastTimeSformer
from tubelet.models.fastback import BidirectionalTemporalAttention
from tubelet.models.sparse import SparseTransformer
from tubelet.models.windowed import WindowedTransformer

WIDTH, HEADS, PATCH = 128, 4, 16
# Frames and pixels of a side, from 64 to 65,536 tokens.
CLIPS = ((4, 64), (16, 64), (16, 128), (32, 128), (16, 256), (32, 256), (16, 512), (32, 512), (64, 512))
FITTED = (1_000, 33_000)  # tokens between which the exponent is fitted
# A masked product of all pairs keeps its mask, one byte a pair.
MAX_MASKED_TOKENS = 16_384

# A layer for clips of this grid: tokens [1, N, WIDTH] -> the same.
Layer = Callable[[Tensor], Tensor]


@dataclass
class Curve:
    """Medians over the clips: number of tokens, seconds of a forward pass and of one with backward, bytes of either."""

    tokens: list[int] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    forward_bytes: list[int] = field(default_factory=list)
    backward_bytes: list[int] = field(default_factory=list)


def run(repeats: int = 5, clips: Sequence[tuple[int, int]] = CLIPS, plot: str = "attention.png") -> list[Row]:
    """The curves, then the comparisons that have a goal."""
    curves = measure(clips, repeats)
    draw(curves, plot)
    print(f"drawn: {plot}")
    rows = [row for name, curve in curves.items() for row in curve_rows(name, curve)]
    return rows + against_regular(repeats) + against_peers(repeats) + fastback_rows(repeats)


def joint(mechanism: str, grid: Grid) -> Layer:
    return MECHANISMS[mechanism](WIDTH, HEADS).to(device())


def divided(mechanism: str, grid: Grid) -> Layer:
    """Over time, then over space."""
    layers = nn.ModuleList(MECHANISMS[mechanism](WIDTH, HEADS) for _ in range(2)).to(device())
    return lambda x: layers[1](layers[0](x, groups=Groups(grid, "time")), groups=Groups(grid, "space"))


def patterned(encoder: type[SparseTransformer], grid: Grid) -> Layer:
    """The first block's attention of an encoder with patterns, at its default pattern."""
    t, h, w = grid
    sizes = {"patch_size": PATCH, "num_frames": t, "tubelet_size": 1, "embed_dim": WIDTH, "num_heads": HEADS}
    model = encoder((h * PATCH, w * PATCH), depth=1, **sizes).to(device())
    attend = model.attend_by(model.patterns[0], None, grid, model.norm.weight)
    return lambda x: model.blocks[0].attn(x, None, attend)


LAYERS: dict[str, Callable[[Grid], Layer]] = {
    **{f"{mechanism}, joint": partial(joint, mechanism) for mechanism in MECHANISMS},
    **{f"{mechanism}, divided": partial(divided, mechanism) for mechanism in MECHANISMS},
    "windowed": partial(patterned, WindowedTransformer),
    "sparse": partial(patterned, SparseTransformer),
}


def measure(clips: Sequence[tuple[int, int]], repeats: int, patience: float = 2.0) -> dict[str, Curve]:
    """A curve for each of LAYERS; the layers take turns at each clip.

    A layer leaves once its next forward pass, if it grew with the square of the tokens, would take longer than
    `patience` seconds, and a masked one where its mask grows too large.
    """
    curves = {name: Curve() for name in LAYERS}
    for frames, size in clips:
        grid = (frames, size // PATCH, size // PATCH)
        tokens = math.prod(grid)
        x = torch.randn(1, tokens, WIDTH, device=device())
        layers = {}
        for name, build in LAYERS.items():
            if _next_forward(curves[name], tokens) <= patience and (name != "sparse" or tokens <= MAX_MASKED_TOKENS):
                layers[name] = build(grid)
        turns = {name: [] for name in layers}
        for layer in layers.values():
            _forward_backward(layer, x)
        for _ in range(repeats):
            for name, layer in layers.items():
                times = seconds(partial(_forward, layer, x)), seconds(partial(_forward_backward, layer, x))
                turns[name].append(times)
        for name, layer in layers.items():
            forward, backward = (statistics.median(times) for times in zip(*turns[name], strict=True))
            curve = curves[name]
            curve.tokens.append(tokens)
            curve.forward.append(forward)
            curve.backward.append(backward)
            curve.forward_bytes.append(peak_bytes(partial(_forward, layer, x)))
            curve.backward_bytes.append(peak_bytes(partial(_forward_backward, layer, x)))
    return curves


def exponent(curve: Curve, values: Sequence[float]) -> float | None:
    """Slope of log value over log tokens within FITTED; None with fewer than two clips there."""
    points = [(n, v) for n, v in zip(curve.tokens, values, strict=True) if FITTED[0] <= n <= FITTED[1]]
    if len(points) < 2:
        return None
    tokens, fitted = np.log(points).T
    return float(np.polyfit(tokens, fitted, 1)[0])


def curve_rows(name: str, curve: Curve) -> list[Row]:
    """A line a clip, and one with the exponent."""
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
    """Time and memory over tokens, log-log; the legend holds the exponents of the forward pass."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, label, forward, backward, unit in (
        (panels[0], "milliseconds", "forward", "backward", 1e-3),
        (panels[1], "MiB at the peak", "forward_bytes", "backward_bytes", 2**20),
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
    figure.savefig(path, dpi=120)


def against_regular(repeats: int) -> list[Row]:
    """Fastformer and Performer against regular attention, forward, all tokens together."""
    rows = []
    for grid in ((16, 16, 16), (16, 32, 32)):
        x = torch.randn(1, math.prod(grid), WIDTH, device=device())
        regular = partial(_forward, joint("regular", grid), x)
        for mechanism in ("fastformer", "performer"):
            timing = in_turn(partial(_forward, joint(mechanism, grid), x), regular, repeats)
            rows.append(_compared(f"{mechanism} against regular, {math.prod(grid)} tokens", timing, goal=1.0))
    return rows


def against_peers(repeats: int) -> list[Row]:
    """Forward passes against the two packages, where installed."""
    rows = []
    if find_spec("performer_pytorch"):
        from performer_pytorch import SelfAttention

        x = torch.randn(1, 4096, WIDTH, device=device())
        ours = PerformerAttention(WIDTH, HEADS).to(device())
        peer = SelfAttention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, nb_features=len(ours.features)).to(device())
        timing = in_turn(partial(_forward, ours, x), partial(_forward, peer, x), repeats)
        rows.append(_compared("performer-pytorch, 4096 tokens", timing, goal=1.5))
    if find_spec("timesformer_pytorch"):
        for size in (128, 256):
            rows += against_timesformer(frames=16, size=size, depth=2, repeats=repeats)
    return rows


def against_timesformer(frames: int, size: int, depth: int, repeats: int) -> list[Row]:
    """Softmax and additive attention against timesformer-pytorch, two clips."""
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
        timing = in_turn(partial(_forward, ours, x), partial(_forward, peer, x), repeats)
        rows.append(_compared(f"timesformer-pytorch, ours {mechanism}, 2x{frames}x{size}", timing, goal=1.5))
    return rows


def fastback_rows(repeats: int) -> list[Row]:
    """FastBack's attention against the same layer unmasked, 8 clips of 16 frames of 64 patches, forward.

    At most 1.1 times as long is the goal: by FlexAttention on a GPU, frame by frame on a CPU.
    """
    grid = (16, 8, 8)
    layer = BidirectionalTemporalAttention(WIDTH, HEADS, HEADS // 2, HEADS // 2, frame_size=64).to(device())
    x = torch.randn(8, math.prod(grid), WIDTH, device=device())
    ours = partial(_forward, partial(layer, attend=layer.attend_among(None, grid, x)), x)
    unmasked = partial(_forward, partial(layer, attend=nn.functional.scaled_dot_product_attention), x)
    timing = in_turn(ours, unmasked, 4 * repeats)
    return [_compared("FastBack against no mask, 8x16x64 tokens", timing, goal=1 / 1.1)]


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of all tensors that operations made and that are alive; `peak` is the most at once."""

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
    """The most bytes of tensors alive at once while `function` runs, over those that were there before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        function()
    return memory.peak


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _forward(layer: Layer, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)
    _wait()


def _forward_backward(layer: Layer, x: Tensor) -> None:
    layer(x.detach().requires_grad_()).sum().backward()
    _wait()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _next_forward(curve: Curve, tokens: int) -> float:
    return curve.forward[-1] * (tokens / curve.tokens[-1]) ** 2 if curve.tokens else 0.0


def _compared(name: str, timing: Timing, goal: float | None) -> Row:
    return Row(f"attention, {name}", f"{timing.ours * 1e3:.1f} ms", f"{timing.peer * 1e3:.1f} ms", timing.ratio, goal)
