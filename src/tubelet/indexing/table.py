"""Write the Parquet file of an index, and what it says of itself."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tubelet.config import ConfigError
from tubelet.data.index_file import open_index
from tubelet.indexing.options import SCHEMA
from tubelet.runtime.files import replacing

METADATA = b"tubelet"
ROW_GROUP = 1 << 16


def write_index(index: Path, tables: Iterable[pa.Table], metadata: dict[str, Any]) -> None:
    """Write the rows of all tables to an index, with row groups of a good size, and what training reads of it."""
    schema = SCHEMA.with_metadata({METADATA: json.dumps(metadata).encode()})
    index.parent.mkdir(parents=True, exist_ok=True)
    with replacing(index) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table.replace_schema_metadata(schema.metadata))
            if sum(map(len, waiting)) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting), row_group_size=ROW_GROUP)
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=ROW_GROUP)
    with contextlib.suppress(ConfigError):  # no video is readable, which is an error where it is used
        open_index(index)


def read_metadata(index: Path) -> dict[str, Any]:
    """Return the `metadata` of `write_index`; empty where there is no such file."""
    if not index.exists():
        return {}
    return json.loads((pq.read_schema(index).metadata or {}).get(METADATA, b"{}"))
