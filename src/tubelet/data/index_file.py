"""Indexes of videos: Parquet files with a row for each video, which `app.index` writes.

Training uses the columns `path` (relative ones are relative to the index's folder), `readable` (others are left out),
`label` and `duration` (seconds); only `path` is required. On first use they are converted to a `RowStore` beside the
index, or in the user's cache where that folder cannot be written. Later starts need neither Parquet nor memory for the
rows. A store belongs to the size and the modification time of the index; an old one may be deleted.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tubelet.config import ConfigError
from tubelet.data.row_store import RowStore, RowStoreWriter
from tubelet.data.rows import Rows
from tubelet.runtime.files import cache_folder, replacing

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".parquet"
VERSION = 1
"""Of the stores; others are not used."""

_BATCH = 1 << 16


class Index(NamedTuple):
    """The readable videos of an index."""

    paths: Rows[str]
    labels: Rows[int]
    """-1 where a video has none."""
    cumulative_durations: Rows[float] | None
    """Seconds of each video and all before it; a video of unknown duration counts as the mean of the others. None where
    no duration is known."""


def open_index(path: Path) -> Index:
    """Open an index.

    Raises:
        ConfigError: It is no Parquet file, lacks the column `path`, or has no readable video.
    """
    store = _store(path)
    folder = str(path.parent)
    durations = store.floats("cumulative_duration") if "cumulative_duration" in store else None
    return Index(store.strings("" if folder == "." else folder), store.integers("label"), durations)


def _store(path: Path) -> RowStore:
    status = path.stat()
    key = hashlib.sha256(f"{VERSION} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    beside = path.with_name(f".{path.name}.{key}.rows")
    of_path = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    in_cache = cache_folder() / f"{of_path}.{key}.rows"
    for stored in (beside, in_cache):
        if stored.is_file():
            return RowStore(stored)
    try:
        _convert(path, beside)
        return RowStore(beside)
    except OSError as error:
        logger.info("%s: %s; the rows of the index are cached in %s", beside, error.strerror, in_cache.parent)
        in_cache.parent.mkdir(parents=True, exist_ok=True)
        _convert(path, in_cache)
        return RowStore(in_cache)


def _convert(path: Path, stored: Path) -> None:
    """Write the store of an index."""
    import pyarrow as pa  # only needed on first use
    import pyarrow.parquet as pq

    with replacing(stored) as temporary, open(temporary, "wb") as file:
        try:
            table = pq.ParquetFile(path)
            _check_columns(path, table.schema_arrow)
            columns = [name for name in ("path", "readable", "label", "duration") if name in table.schema_arrow.names]
            labels, durations = [np.zeros(0, np.int32)], [np.zeros(0)]
            writer = RowStoreWriter(file)
            for batch in table.iter_batches(_BATCH, columns=columns):
                batch = batch.filter(_readable(batch))
                names = batch["path"].cast(pa.large_binary())
                offsets = np.frombuffer(names.buffers()[1], np.int64)[names.offset : names.offset + len(names) + 1]
                if len(names):
                    writer.add(memoryview(names.buffers()[2])[offsets[0] : offsets[-1]], np.diff(offsets))
                    labels.append(_numbers(batch, "label", pa.int32(), -1))
                    durations.append(_numbers(batch, "duration", pa.float64(), np.nan))
        except pa.ArrowInvalid as error:
            raise ConfigError(f"data.datasets: {path}: not a Parquet file: {str(error).splitlines()[0]}") from None
        of_rows = {"label": np.concatenate(labels)}
        if not len(of_rows["label"]):
            raise ConfigError(f"data.datasets: {path}: none of the videos in this index is readable")
        if (cumulative := _cumulative(np.concatenate(durations))) is not None:
            of_rows["cumulative_duration"] = cumulative
        writer.finish(of_rows)


def _check_columns(path: Path, schema) -> None:
    import pyarrow as pa

    if "path" not in schema.names:
        raise ConfigError(f"data.datasets: {path} has no column path; it has {', '.join(schema.names)}")
    expected = {
        "path": (_is_text, "text"),
        "readable": (pa.types.is_boolean, "bool"),
        "label": (pa.types.is_integer, "an integer"),
        "duration": (_is_number, "a number"),
    }
    for name, (is_type, title) in expected.items():
        if name in schema.names and not is_type(schema.field(name).type):
            raise ConfigError(
                f"data.datasets: {path}: column {name} is {schema.field(name).type}; it has to be {title}"
            )


def _is_text(kind) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind) -> bool:
    import pyarrow as pa

    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _readable(batch):
    """Return which rows are used, a boolean Arrow array."""
    import pyarrow.compute as pc

    has_path = pc.is_valid(batch["path"])
    return pc.and_(has_path, pc.fill_null(batch["readable"], True)) if "readable" in batch.schema.names else has_path


def _numbers(batch, column: str, kind, missing: float) -> np.ndarray:
    """Return a column as an array of the Arrow type `kind`, with `missing` where there is no value."""
    import pyarrow.compute as pc

    if column not in batch.schema.names:
        return np.full(len(batch), missing, kind.to_pandas_dtype())
    return pc.fill_null(batch[column].cast(kind), missing).to_numpy(zero_copy_only=False)


def _cumulative(durations: np.ndarray) -> np.ndarray | None:
    known = np.isfinite(durations) & (durations > 0)
    if not known.any():
        return None
    durations[~known] = durations[known].mean()
    return np.cumsum(durations)
