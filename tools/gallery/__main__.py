"""Draws the pictures of docs/gallery.md: `python -m tools.gallery NAME [SOURCE] [--out FILE]`.

Drawings are SVG, frames are PNG with at most 256 colors. SOURCE is the folder of a run or a study, or a page with a
table.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from tools.gallery import clip_pictures, plots
from tubelet.report.figures import to_svg
from tubelet.runtime import command_line

MAX_BYTES = 150_000
"""Of a picture, as all of them are part of the repository."""


@dataclass(frozen=True)
class Entry:
    """A picture: how it is drawn, from what, and its file."""

    draw: Callable[[Path], Figure | Image.Image]
    source: str
    out: str


PICTURES = {
    "masks": Entry(clip_pictures.masks, "runs/demo", "docs/masks.png"),
    "features": Entry(clip_pictures.features, "runs/demo", "docs/features_as_colors.png"),
    "futures": Entry(clip_pictures.prediction, "runs/moving_mnist_latents", "docs/latent_futures.png"),
    "frames": Entry(clip_pictures.prediction, "runs/moving_mnist", "docs/moving_mnist.png"),
    "curves": Entry(plots.learning_curves("demo"), "runs/objectives", "docs/learning_curves.svg"),
    "curves_thermal": Entry(plots.learning_curves("thermal"), "runs/objectives", "docs/learning_curves_thermal.svg"),
    "packed": Entry(plots.packed, "docs/cluster_data.md", "docs/packed.svg"),
}


def save(picture: Figure | Image.Image, path: Path) -> None:
    """Write a picture, small.

    Raises:
        ValueError: It has more than `MAX_BYTES`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, Figure):
        path.write_text(to_svg(picture), encoding="utf-8")
    else:
        colors = picture.convert("RGBA").quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        colors.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gallery", description=__doc__)
    parser.add_argument("name", choices=PICTURES, metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("source", nargs="?", type=Path, metavar="SOURCE", help="default: that of docs/gallery.md")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: that of docs/gallery.md")
    arguments = parser.parse_args(argv)
    entry = PICTURES[arguments.name]
    out = arguments.out or Path(entry.out)
    with command_line.exit_on_error():
        save(entry.draw(arguments.source or Path(entry.source)), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
