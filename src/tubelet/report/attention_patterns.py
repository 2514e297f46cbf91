"""Figure of the tokens that a token attends to in each encoder: `python -m tubelet.report.attention_patterns`."""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from tubelet.layers import Attention
from tubelet.layers.mixing import MixingLayer
from tubelet.models.fast_timesformer import FastTimeSformer
from tubelet.models.fastback import BTTransformer
from tubelet.models.multiscale import Lateral, MultiscaleTransformer
from tubelet.models.sparse import SparseTransformer
from tubelet.models.timesformer import TimeSformer
from tubelet.models.vivit import ViViT
from tubelet.models.windowed import WindowedTransformer
from tubelet.report.figures import to_svg

GRID = (6, 8, 8)
TOKEN = (2, 3, 4)  # time slot, row, column
PATCH = 2  # pixels; any size would do
# Tokens that are not attended to, and those attended to by the first part, by the second, by both.
COLORS = ("#ececec", "#1f6fb4", "#e0661c", "#3a9a5b")


@dataclass(frozen=True)
class Part:
    """An attention layer of an encoder.

    Args:
        label: Text in the figure.
        layer: Name of the module.
        heads: Heads of the layer; None for all.
    """

    label: str
    layer: str
    heads: slice | None = None


@dataclass(frozen=True)
class Panel:
    title: str
    encoder: nn.Module
    parts: Sequence[Part]


def panels() -> list[Panel]:
    """Return one panel for each pattern, with at most two parts, which are drawn in two colors."""
    sizes: dict[str, Any] = {"img_size": PATCH * GRID[1], "patch_size": PATCH, "num_frames": GRID[0], "tubelet_size": 1}
    small: dict[str, Any] = {**sizes, "embed_dim": 48, "num_heads": 2, "depth": 2}
    timesformer, vivit = partial(TimeSformer, **small), partial(ViViT, **small)
    over_time, over_space = partial(Part, "over time"), partial(Part, "over space")
    return [
        Panel(
            "TimeSformer, joint; ViViT 1; V-JEPA", timesformer(attention_type="joint"), [Part("all", "blocks.0.attn")]
        ),
        Panel(
            "TimeSformer, divided",
            timesformer(),
            [over_time("blocks.0.temporal_attn"), over_space("blocks.0.attn")],
        ),
        Panel(
            "TimeSformer, space only; ViViT 2's spatial encoder",
            timesformer(attention_type="space_only"),
            [over_space("blocks.0.attn")],
        ),
        Panel(
            "ViViT 3, factorised self-attention",
            vivit(variant="factorised_self_attention"),
            [over_time("blocks.0.temporal_attn"), over_space("blocks.0.attn")],
        ),
        Panel(
            "ViViT 4, factorised dot product",
            vivit(variant="factorised_dot_product"),
            [
                Part("heads over time", "blocks.0.attn", slice(1, 2)),
                Part("heads over space", "blocks.0.attn", slice(1)),
            ],
        ),
        Panel(
            "FastTimeSformer, divided (Fastformer)",
            FastTimeSformer(**small),
            [over_time("blocks.0.attentions.0"), over_space("blocks.0.attentions.1")],
        ),
        Panel(
            "Windowed: windows of 2 x 4 x 4",
            WindowedTransformer(**small, window_size=(2, 4, 4)),
            [Part("even blocks", "blocks.0.attn"), Part("odd blocks, shifted", "blocks.1.attn")],
        ),
        Panel(
            "Sparse, as by default",
            SparseTransformer(**small),
            [Part("even blocks", "blocks.0.attn"), Part("odd blocks", "blocks.1.attn")],
        ),
        Panel(
            "FastBack",
            BTTransformer(**small),
            [Part("lookback heads", "blocks.0.attn", slice(1)), Part("lookahead heads", "blocks.0.attn", slice(1, 2))],
        ),
        Panel(
            "Multi-scale, every third slot in the slow path",
            MultiscaleTransformer(**small, fast_embed_dim=24, fast_num_heads=3, frame_stride=3),
            [Part("fast path", "fast_blocks.0.attn"), Part("slow path", "readout")],
        ),
    ]


def receptive_field(encoder: nn.Module, part: Part, token: tuple[int, int, int] = TOKEN) -> Tensor:
    """Compute on which patches the features of a token depend through one attention layer alone.

    The output projections of all other attention layers are set to zero, so that only this one mixes tokens. A token
    always depends on itself, through the residual connections.

    Args:
        encoder: Encoder of clips with the token grid `GRID`.
        part: The attention layer.
        token: Time slot, row and column.

    Returns:
        bool [t, h, w].
    """
    encoder = copy.deepcopy(encoder).eval()
    for name, layer in encoder.named_modules():
        if isinstance(layer, Attention | MixingLayer | Lateral):
            acts = torch.zeros(layer.num_heads)
            if name == part.layer:
                acts[part.heads or slice(None)] = 1
            layer.proj.weight.data *= acts.repeat_interleave(layer.head_dim)
    generator = torch.Generator().manual_seed(0)
    t, h, w = GRID
    clip = torch.randn(1, 3, t, h * PATCH, w * PATCH, generator=generator, requires_grad=True)
    features = encoder(clip).unflatten(1, GRID)[0][token]
    # Random weights, as the plain sum of the features is constant after the last normalization layer.
    (features * torch.randn(features.shape, generator=generator)).sum().backward()
    assert clip.grad is not None
    return reduce(clip.grad.abs(), "1 C t (h p) (w q) -> t h w", "max", p=PATCH, q=PATCH) > 0


def draw(path: str) -> None:
    """Draw all panels below each other: the time slots from left to right, the token with a black border."""
    all_panels = panels()
    figure = Figure(figsize=(5.6, 1.02 * len(all_panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(all_panels), 1), all_panels, strict=True):
        _draw_panel(axes, panel)
    Path(path).write_text(to_svg(figure), encoding="utf-8")


def _draw_panel(axes, panel: Panel) -> None:
    t, h, w = GRID
    fields = [receptive_field(panel.encoder, part).int() * number for number, part in enumerate(panel.parts, start=1)]
    kinds = torch.stack(fields).sum(0)
    colors = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS], dtype=np.uint8)
    image = np.full((h, t * (w + 1) - 1, 3), 255, dtype=np.uint8)
    for slot, of_slot in enumerate(colors[kinds.numpy()]):
        image[:, slot * (w + 1) : slot * (w + 1) + w] = of_slot
    # Squares that are enlarged here: viewers of SVG would blur the few pixels.
    axes.imshow(image.repeat(8, 0).repeat(8, 1), extent=(-0.5, image.shape[1] - 0.5, h - 0.5, -0.5))
    slot, row, column = TOKEN
    axes.add_patch(Rectangle((slot * (w + 1) + column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", lw=1.5))
    axes.set_axis_off()
    axes.set_title(panel.title, fontsize=8, loc="left", pad=3)
    labels = [part.label for part in panel.parts] + (["both"] if (kinds == 3).any() else [])
    for number, label in enumerate(labels):
        axes.text(
            1 - 0.19 * (len(labels) - 1 - number), 1.06, label, color=COLORS[number + 1], fontsize=6.5, ha="right",
            transform=axes.transAxes,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tubelet.report.attention_patterns", description=__doc__)
    parser.add_argument("--out", default="docs/attention_patterns.svg", help="SVG file (default: %(default)s)")
    out = parser.parse_args().out
    draw(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
