"""Near-duplicates by their perceptual hashes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tubelet.indexing.options import SCHEMA

BANDS = 4
BAND_BITS = 16
MAX_DISTANCE = 11
"""Hashes that differ in more bits are not found: a band would differ in more than two."""
_CANDIDATES = 1 << 22
"""Pairs that are compared at once."""

DUPLICATES_SCHEMA = pa.schema([("path", pa.string()), ("duplicate_of", pa.string()), ("distance", pa.int8())])


def find_duplicates(index: Path, max_distance: int) -> pa.Table:
    """Return the near-duplicates in an index, with the video that is kept in their place and the bits that differ.

    Of each group the video with most pixels is kept, then the longest, then the first path. Each other video is at most
    `max_distance` bits from the one that is kept, and no two that are kept are that near.
    """
    columns = ["path", "width", "height", "duration", "perceptual_hash"]
    usable = pc.field("readable") & pc.field("perceptual_hash").is_valid()
    videos = pq.read_table(index, columns=columns, filters=usable)
    pixels = pc.multiply(videos["width"].cast(pa.int64()), videos["height"]).to_numpy()
    durations = videos["duration"].to_numpy()
    best_first = np.lexsort((np.arange(len(videos)), -durations, -pixels))  # the rows are sorted by path
    hashes = videos["perceptual_hash"].to_numpy()[best_first]
    kept = near_duplicates(hashes, max_distance)
    rows = np.flatnonzero(kept != np.arange(len(kept)))
    distances = np.bitwise_count(hashes[rows] ^ hashes[kept[rows]])
    found = [videos["path"].take(pa.array(best_first[of])) for of in (rows, kept[rows])]
    table = pa.table([*found, pa.array(distances.astype(np.int8))], schema=DUPLICATES_SCHEMA)
    return table.sort_by([("duplicate_of", "ascending"), ("path", "ascending")])


def without(index: Path, paths: pa.ChunkedArray) -> Iterator[pa.Table]:
    """Yield the rows of an index, in parts, without those of `paths`."""
    dropped = paths.combine_chunks()
    for batch in pq.ParquetFile(index).iter_batches(columns=SCHEMA.names):
        yield pa.Table.from_batches([batch]).filter(pc.invert(pc.is_in(batch["path"], dropped)))


def near_duplicates(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """Return for each of n hashes the row that is kept in its place, its own where it is kept itself, int64 [n].

    The first row is kept. Each other is kept unless it differs in at most `max_distance` bits from a row before it that
    is kept; it then belongs to the first such row.
    """
    unique, first, of_row = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # unique hashes by their first row
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    pairs = [np.zeros((2, 0), np.int64), *(rank[pair] for pair in near_pairs(unique, max_distance))]
    low, high = np.sort(np.concatenate(pairs, axis=1), axis=0)
    by_low = np.lexsort((high, low))
    kept = np.arange(len(unique))
    for pair in np.split(by_low, np.flatnonzero(np.diff(low[by_low])) + 1) if len(low) else ():
        row, others = low[pair[0]], high[pair]
        if kept[row] == row:
            kept[others[kept[others] == others]] = row
    return first[order][kept[rank[of_row]]]


def near_pairs(hashes: np.ndarray, max_distance: int) -> Iterator[np.ndarray]:
    """Yield the pairs of distinct hashes that differ in at most `max_distance` bits, int64 [2, n]; one pair may repeat.

    Two such hashes differ in at most a quarter of these bits in one of four bands of 16 bits. So each hash is compared
    only with those whose band is equal up to so many bits.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance {max_distance}: expected 0 to {MAX_DISTANCE}")
    values = np.arange(1 << BAND_BITS, dtype=np.uint64)
    masks = values[np.bitwise_count(values) <= max_distance // BANDS]
    for band in range(BANDS):
        keys = hashes >> np.uint64(band * BAND_BITS) & np.uint64((1 << BAND_BITS) - 1)
        rows = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[rows], np.arange((1 << BAND_BITS) + 1))
        for mask in masks:
            near = (keys ^ mask).astype(np.int64)
            counts = starts[near + 1] - starts[near]
            for part in _parts(counts):
                one = np.repeat(np.arange(part.start, part.stop), counts[part])
                ends = np.cumsum(counts[part])
                within = np.arange(len(one)) - np.repeat(ends - counts[part], counts[part])
                two = rows[np.repeat(starts[near[part]], counts[part]) + within]
                is_near = (one < two) & (np.bitwise_count(hashes[one] ^ hashes[two]) <= max_distance)
                yield np.stack([one[is_near], two[is_near]])


def _parts(counts: np.ndarray) -> Iterator[slice]:
    """Yield ranges of rows with about `_CANDIDATES` candidates each; a single row may have more."""
    totals = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, before + _CANDIDATES, side="right")))
        yield slice(start, stop)
        start = stop
