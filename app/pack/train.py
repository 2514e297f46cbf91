"""Re-encode videos to small files with short distances between key frames, and write them as WebDataset shards.

    python -m app.main --fname configs/data/pack.yaml folder=/data/packed data.datasets=[/data/videos]

The same command continues after a stop. Which videos a shard has, and its bytes, do not depend on the number of
processes and tasks, so a shard is either there or is written anew.
"""

import logging
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute  # noqa: F401, used as pa.compute
import pyarrow.parquet as pq

from app.pack.options import Options
from app.pack.shard import SCHEMA, ShardWriter, source_name
from app.pack.workers import PackError, Videos, write_shards
from tubelet.config import ConfigError, UserError, dump
from tubelet.data.rows import join_numbers, join_strings
from tubelet.data.sources import VIDEO_SUFFIXES, check_whole_files, read_source
from tubelet.runtime.distributed import World
from tubelet.runtime.files import replacing, write_atomic
from tubelet.runtime.progress import progress
from tubelet.runtime.run_folder import check_same_configuration

logger = logging.getLogger(__name__)


def main(options: Options, world: World) -> None:
    """Write the shards of this task; the one that completes the last shard also writes the table of all clips."""
    folder = options.output_folder
    check_same_configuration(folder, options)
    # Before the configuration is written: a mistyped path must not occupy the folder.
    sources = [read_source(entry, VIDEO_SUFFIXES, options.data.storage) for entry in options.data.datasets]
    for entry, source in zip(options.data.datasets, sources, strict=True):
        check_whole_files(entry, source, "a shard")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", dump(options))
    paths = join_strings([source.paths for source in sources])
    labels = join_numbers([source.labels for source in sources])

    rows = range(len(paths))
    parts = [rows[first : first + options.videos_per_shard] for first in rows[:: options.videos_per_shard]]
    shards = range(len(parts))

    def videos_of(shard: int) -> Videos:
        part = slice(parts[shard].start, parts[shard].stop)
        return list(zip(paths[part], labels[part], strict=True))

    tasks, task = options.tasks * world.world_size, options.task * world.world_size + world.rank
    mine = shards[task::tasks]
    missing = [shard for shard in mine if not _is_complete(options, shard, videos_of)]
    num_videos, num_missing = (sum(len(parts[shard]) for shard in group) for group in (mine, missing))
    with progress(desc="packing", total=num_videos, initial=num_videos - num_missing, unit="video") as bar:
        try:
            write_shards(options, videos_of, missing, bar.update)
        except PackError as error:
            raise UserError(f"{error}. Complete shards are kept; the same command continues") from None
    tables = [ShardWriter(options, shard).table for shard in shards]
    if all(table.is_file() for table in tables):
        write_table(options, pa.concat_tables([pq.read_table(table, schema=SCHEMA) for table in tables]))


def write_table(options: Options, table: pa.Table) -> None:
    """Write the rows of all clips and the list of unreadable videos, and say what was done."""
    with replacing(options.output_folder / "clips.parquet") as temporary:
        pq.write_table(table.filter(table["readable"]), temporary)
    failed = table.filter(pa.compute.invert(table["readable"])).to_pylist()
    lines = "".join(f"{row['source']}\t{' '.join(row['reason'].split())}\n" for row in failed)
    write_atomic(options.output_folder / "bad_files.txt", lines.encode("utf-8", "surrogateescape"))
    clips = table.filter(table["readable"])
    if not len(clips):
        raise UserError(f"none of the {len(failed)} videos can be read; see {options.output_folder}/bad_files.txt")
    size, psnr = pa.compute.sum(clips["size"]).as_py(), pa.compute.quantile(clips["psnr"], [0, 0.5]).to_pylist()
    logger.info(
        "%d clips, %.1f MB, PSNR %.1f dB (median), %.1f dB (lowest); %d videos cannot be read (bad_files.txt); %s",
        len(clips), size / 1e6, psnr[1], psnr[0], len(failed), options.output_folder / "clips.parquet",
    )  # fmt: skip


def _is_complete(options: Options, shard: int, videos_of: Callable[[int], Videos]) -> bool:
    writer = ShardWriter(options, shard)
    if not writer.is_complete():
        return False
    rows = pq.read_table(writer.table, columns=["source", "label"]).to_pylist()
    written = dict.fromkeys((row["source"], row["label"]) for row in rows)
    if list(written) != list(dict.fromkeys((source_name(path), label) for path, label in videos_of(shard))):
        raise ConfigError(
            f"{writer.table} is of other videos or labels: the files in `data.datasets` have changed. Choose another "
            "folder, or remove this one"
        )
    return True
