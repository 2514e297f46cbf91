import math

import pytest
import torch

from tubelet.layers.pattern_attention import boolean_mask
from tubelet.layers.patterns import Lookahead, Lookback, SpatialWindow, TemporalWindow, Window, parse_pattern
from tubelet.report import attention_patterns
from tubelet.report.attention_patterns import GRID, TOKEN, panels, receptive_field

SPACE, TIME, ALL = TemporalWindow(0), SpatialWindow(0), TemporalWindow(99)
# Patterns whose mask each part of each panel has to show.
EXPECTED = {
    "TimeSformer, joint": [ALL],
    "TimeSformer, divided": [TIME, SPACE],
    "TimeSformer, space only": [SPACE],
    "ViViT 3": [TIME, SPACE],
    "ViViT 4": [TIME, SPACE],
    "FastTimeSformer": [TIME, SPACE],
    "Windowed": [Window((2, 4, 4)), Window((2, 4, 4), (1, 2, 2))],
    "Sparse": [TemporalWindow(1), parse_pattern("TemporalStride(2) & SpatialStride(2) | SpatialWindow(0)")],
    "FastBack": [Lookback(), Lookahead()],
    "Multi-scale": [ALL, None],
}


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel.title)
def test_receptive_fields_equal_the_masks_of_the_patterns(panel):
    (expected,) = (patterns for title, patterns in EXPECTED.items() if panel.title.startswith(title))
    assert len(expected) == len(panel.parts)
    t, h, w = GRID
    index = (TOKEN[0] * h + TOKEN[1]) * w + TOKEN[2]
    for part, pattern in zip(panel.parts, expected, strict=True):
        if pattern is None:  # the slow path: every third slot, and the token itself
            row = torch.arange(math.prod(GRID)) // (h * w) % 3 == 0
            row[index] = True
        else:
            row = boolean_mask((pattern,), GRID)[0, 0, index]
        assert torch.equal(receptive_field(panel.encoder, part), row.view(GRID))


def test_picture_is_small(tmp_path):
    attention_patterns.draw(str(tmp_path / "patterns.svg"))
    assert 10_000 < (tmp_path / "patterns.svg").stat().st_size < 150_000
