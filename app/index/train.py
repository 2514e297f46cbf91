"""Write an index of videos: one row for each file, near-duplicates, and a report.

    python -m app.main --fname configs/data/index.yaml folder=runs/index data.datasets=[/data/videos]

The same command continues after a stop, and later updates the index: only new and changed files are read.
"""

import logging
import os
import uuid
from pathlib import Path

from pyarrow import csv

from app.index.options import Options
from tubelet.config import dump
from tubelet.indexing import build, duplicates, table
from tubelet.report import index_page
from tubelet.runtime.distributed import World
from tubelet.runtime.files import replacing, write_atomic

logger = logging.getLogger(__name__)


def main(options: Options, world: World) -> None:
    """Take part in writing the index. The process that completes it also writes the duplicates and the report."""
    folder, index = Path(options.folder), options.index_path
    folder.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        write_atomic(folder / "config.yaml", dump(options))
    # Processes of one call or job array that start late must not begin anew when the others have finished.
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or world.broadcast_from_rank0(lambda: uuid.uuid4().hex)
    completed = build.build(
        index,
        options.data.datasets,
        options.reading,
        processes=options.num_processes,
        part_size=options.part_size,
        relative=options.relative,
        job=job,
        show_progress=world.is_main,
    )
    if not completed:
        logger.info("%s was completed by another process", index)
        return
    if options.reading.perceptual_hash and options.duplicates.max_distance is not None:
        write_duplicates(options, index)
    page = index_page.write(index, index.with_suffix(".html"), options.thumbnails)
    logger.info("wrote %s and %s", index, page)


def write_duplicates(options: Options, index: Path) -> None:
    """Write `<index>.duplicates.csv` and, with `duplicates.drop`, the index without them."""
    assert options.duplicates.max_distance is not None
    found = duplicates.find_duplicates(index, options.duplicates.max_distance)
    with replacing(index.with_suffix(".duplicates.csv")) as temporary:
        csv.write_csv(found, temporary)
    logger.info("%d near-duplicates, listed in %s", len(found), index.with_suffix(".duplicates.csv"))
    if options.duplicates.drop:
        deduplicated = index.with_suffix(".deduplicated.parquet")
        table.write_index(deduplicated, duplicates.without(index, found["path"]), {})
        logger.info("wrote %s", deduplicated)
