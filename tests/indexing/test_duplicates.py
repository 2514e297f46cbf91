import numpy as np
import pyarrow as pa
import pytest

from tubelet.indexing.duplicates import MAX_DISTANCE, find_duplicates, near_duplicates, near_pairs, without
from tubelet.indexing.options import SCHEMA
from tubelet.indexing.table import write_index


def near_hashes(seed, groups=60, members=6, bits=6):
    """Random 64-bit hashes, each with some copies of which up to `bits` bits differ, in random order."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, groups, dtype=np.uint64).repeat(members)
    for row in range(len(hashes)):
        for bit in rng.integers(0, 64, rng.integers(bits + 1)):
            hashes[row] ^= np.uint64(1) << np.uint64(bit)
    return rng.permutation(hashes)


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, MAX_DISTANCE])
def test_pairs_are_those_of_a_comparison_of_all(distance):
    hashes = np.unique(near_hashes(distance))
    near = np.triu(np.bitwise_count(hashes[:, None] ^ hashes) <= distance, 1)
    found = {tuple(pair) for pairs in near_pairs(hashes, distance) for pair in pairs.T.tolist()}
    assert found == set(zip(*map(np.ndarray.tolist, np.nonzero(near)), strict=True))
    assert distance == 0 or found


@pytest.mark.parametrize("distance", [0, 2, 4, 8])
def test_kept_rows_are_those_of_one_pass_over_all(distance):
    hashes = near_hashes(distance, bits=9)
    expected = []
    for row, value in enumerate(hashes):
        kept = (i for i in range(row) if expected[i] == i and np.bitwise_count(hashes[i] ^ value) <= distance)
        expected.append(next(kept, row))
    assert near_duplicates(hashes, distance).tolist() == expected


def test_many_equal_hashes_are_no_problem():
    hashes = np.array([5] * 50_000 + [7] * 50_000, np.uint64)
    assert near_duplicates(hashes, 0).tolist() == [0] * 50_000 + [50_000] * 50_000
    assert near_duplicates(hashes, 1).tolist() == [0] * 100_000


def test_a_distance_that_the_bands_cannot_find_is_refused():
    with pytest.raises(ValueError, match="expected 0 to 11"):
        list(near_pairs(np.zeros(1, np.uint64), 12))


def test_the_largest_then_the_longest_then_the_first_is_kept(tmp_path):
    videos = [  # path, width, height, duration, hash, readable
        ("a", 320, 240, 9.0, 0b0000, True),
        ("b", 640, 480, 5.0, 0b0001, True),
        ("c", 640, 480, 6.0, 0b0011, True),
        ("d", 640, 480, 6.0, 0b0010, True),
        ("e", 999, 999, 9.0, 0b0000, False),
        ("f", 100, 100, 9.0, 0xFFFF << 40, True),
        ("g", 100, 100, 9.0, None, True),
    ]
    keys = ("path", "width", "height", "duration", "perceptual_hash", "readable")
    rows = [dict(zip(keys, video, strict=True)) for video in videos]
    index = tmp_path / "index.parquet"
    write_index(index, iter([pa.Table.from_pylist(rows, SCHEMA)]), {})
    found = find_duplicates(index, 2)
    assert [tuple(row.values()) for row in found.to_pylist()] == [("a", "c", 2), ("b", "c", 1), ("d", "c", 1)]
    rest = pa.concat_tables(without(index, found["path"]))
    assert rest["path"].to_pylist() == ["c", "e", "f", "g"]
