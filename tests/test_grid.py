import pytest

from tubelet.grid import ClipShape, Grid


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        (ClipShape(16, 224), (8, 14, 14)),
        (ClipShape(16, (96, 160)), (8, 6, 10)),
        (ClipShape(8, 64, (16, 8), 4), (2, 4, 8)),
        (ClipShape(1, 64), (1, 4, 4)),
        (ClipShape(3, 64, tubelet_size=1), (3, 4, 4)),
    ],
)
def test_grid_of_a_clip(shape, grid):
    assert shape.grid == Grid(*grid)
    assert shape.grid.num_tokens == grid[0] * grid[1] * grid[2]
    assert shape.grid.tokens_per_frame == grid[1] * grid[2]
    assert ClipShape(**shape.as_dict()) == shape


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (ClipShape(16, 225), "crop_size 225 is not divisible by patch_size 16; the nearest valid size is 224"),
        (ClipShape(16, (224, 100)), "crop_size 224x100 .* nearest valid size is 224x96"),
        (ClipShape(16, 4), "nearest valid size is 16"),
        (ClipShape(15, 224), "num_frames 15 is not divisible by tubelet_size 2; the nearest valid number is 16"),
        (ClipShape(0, 224), "num_frames 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest(shape, message):
    with pytest.raises(ValueError, match=message):
        _ = shape.grid


def test_a_video_model_takes_no_single_frame():
    assert ClipShape(1, 32, 16, 1).video_grid == (1, 2, 2)
    with pytest.raises(ValueError, match="num_frames 1 is not divisible by tubelet_size 2"):
        _ = ClipShape(1, 32).video_grid
