"""Pictures of docs/gallery.md: each is there, small, named on the page with its command, and drawn from its source."""

import numpy as np
import pytest
from PIL import Image

from tests.docs.pages import DOCS, ROOT, links, text
from tools.gallery import __main__ as gallery
from tools.gallery import clip_pictures, plots
from tubelet.config import ConfigError
from tubelet.report.figures import to_svg

PAGE = DOCS / "gallery.md"


@pytest.mark.parametrize("name", gallery.PICTURES)
def test_pictures_are_on_the_page_with_their_commands(name):
    assert (ROOT / gallery.PICTURES[name].out).name in links(PAGE)
    assert f"python -m tools.gallery {name}\n" in text(PAGE)


@pytest.mark.parametrize("path", sorted([*DOCS.glob("*.png"), *DOCS.glob("*.svg")]), ids=lambda path: path.name)
def test_pictures_are_small(path):
    assert path.stat().st_size <= gallery.MAX_BYTES


def test_picture_of_packing_has_the_numbers_of_the_page():
    axes = plots.packed(DOCS / "cluster_data.md").axes[0]
    rows = plots.table(text(DOCS / "cluster_data.md"), "original, packed to")
    widths = [bar.get_width() for bar in axes.patches]
    assert len(rows) == 6
    assert widths[:6] == [float(row["clips/s, original"]) for row in rows]
    assert widths[6:] == [float(row["clips/s, packed"]) for row in rows]


def test_equal_figures_give_equal_texts():
    texts = {to_svg(plots.packed(DOCS / "cluster_data.md")) for _ in range(2)}
    assert len(texts) == 1


def test_tiles_of_a_mosaic_are_in_their_row_and_slot():
    columns = {name: np.zeros((2, 3, 1, 1, 3), np.uint8) for name in ("frames", "features")}
    columns["features"][1, 2] = 200
    picture = np.asarray(clip_pictures._mosaic(columns, ["pan", "turn"]))
    y, x = np.nonzero((picture[..., :3] == 200).all(-1))
    step = clip_pictures.TILE + clip_pictures.GAP
    assert y.min() == clip_pictures.TITLE + step
    assert x.min() == clip_pictures.LABEL + 3 * step + 4 * clip_pictures.GAP + 2 * step
    assert len(y) == clip_pictures.TILE**2
    assert picture[0, -1, 3] == 0  # transparent


def test_too_large_a_picture_is_an_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="more than 150,000"):
        gallery.save(Image.fromarray(noise), tmp_path / "noise.png")


def test_missing_sources_are_errors(tmp_path):
    for name, entry in gallery.PICTURES.items():
        with pytest.raises((ConfigError, OSError)):
            entry.draw(tmp_path / name)
