"""The report of an index of videos as one page."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image

from tubelet.data import VideoError
from tubelet.data.decoders import open_video, read_frames
from tubelet.report import figures
from tubelet.report.html_parts import Picture, document, escape, figure, table
from tubelet.runtime.files import write_atomic

MAX_LINES = 15
"""Lines of a table; rarer values are summed up."""
THUMBNAIL_HEIGHT, THUMBNAILS_IN_ROW = 120, 6
MAX_THUMBNAIL_WIDTH = 2 * THUMBNAIL_HEIGHT

COLUMNS = (
    *("path", "size", "container", "codec", "width", "height", "frames_from", "duration", "fps"),
    *("key_frame_seconds", "audio", "rotation", "readable", "reason"),
)


def write(index: Path, page: Path, thumbnails: int) -> Path:
    """Write the report of an index.

    Args:
        index: The Parquet file; `<index>.duplicates.csv` beside it is shown where it exists.
        page: The HTML file.
        thumbnails: Number of videos of which a frame is shown.

    Returns:
        `page`.
    """
    rows = pq.read_table(index, columns=list(COLUMNS))
    videos = rows.filter(rows["readable"])
    sections = [f"<p>{escape(_summary(rows, videos))}</p>", *_unreadable(rows)]
    if len(videos):
        sections += [*_histograms(videos), *_tables(videos), *_duplicates(index.with_suffix(".duplicates.csv"))]
        sections += _thumbnails(index, videos, thumbnails)
    write_atomic(page, document(f"Index {index.name}", sections))
    return page


def _summary(rows: pa.Table, videos: pa.Table) -> str:
    hours = (pc.sum(videos["duration"]).as_py() or 0.0) / 3600
    size = (pc.sum(rows["size"]).as_py() or 0) / 1e9
    return f"{len(rows):,} files of {size:,.2f} GB together; {len(videos):,} can be read: {hours:,.2f} hours of video."


def _unreadable(rows: pa.Table) -> list[str]:
    bad = rows.filter(pc.invert(rows["readable"]))
    if not len(bad):
        return ["<h2>Unreadable files</h2>", "<p>None.</p>"]
    reasons = (
        bad.group_by("reason").aggregate([("path", "count"), ("path", "min")]).sort_by([("path_count", "descending")])
    )
    lines = [[line["reason"], f"{line['path_count']:,}", line["path_min"]] for line in reasons[:MAX_LINES].to_pylist()]
    if others := len(bad) - sum(reasons[:MAX_LINES]["path_count"].to_pylist()):
        lines.append(["other reasons", f"{others:,}", ""])
    text = f"{len(bad):,} of {len(rows):,} files. Training leaves them out."
    return ["<h2>Unreadable files</h2>", f"<p>{text}</p>", table([["reason", "files", "for example"], *lines])]


def _histograms(videos: pa.Table) -> list[str]:
    short_side = pc.min_element_wise(videos["width"], videos["height"])
    drawn = [
        _histogram("Duration", "seconds", videos["duration"], log=True),
        _histogram("Resolution", "pixels of the shorter side", short_side, log=False),
        _histogram("Frame rate", "frames per second", videos["fps"], log=False),
        _histogram("Key frames", "median seconds between two key frames", videos["key_frame_seconds"], log=True),
    ]
    advice = (
        "A clip is decoded from the key frame before it: the number of frames that are decoded and not used grows with "
        "the distance of key frames."
    )
    return ["<h2>Videos</h2>", '<div class="grid">', *map(figure, drawn), "</div>", f"<p>{advice}</p>"]


def _histogram(title: str, unit: str, column: pa.ChunkedArray, log: bool) -> Picture:
    values = column.drop_null().to_numpy().astype(float)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return Picture(title, f"{title}: not known for any video.", None)
    low, high = values.min(), values.max()
    if low == high:
        low, high = 0.9 * low, 1.1 * high
    bins = np.geomspace(low, high, 41) if log else np.linspace(low, high, 41)
    canvas = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = canvas.add_subplot()
    axes.hist(values, bins=bins.tolist(), color=figures.COLORS[0])
    axes.set(xlabel=unit, ylabel="videos", title=title, xscale="log" if log else "linear")
    quantiles = ", ".join(f"{np.quantile(values, q):.4g}" for q in (0.05, 0.5, 0.95))
    caption = f"{title} in {unit}; 5 %, 50 % and 95 % quantile: {quantiles}."
    return Picture(title, caption, figures.to_png(canvas), plot=True)


def _tables(videos: pa.Table) -> list[str]:
    sizes = zip(videos["width"].to_pylist(), videos["height"].to_pylist(), strict=True)
    counted = {
        "codec": _counts(videos["codec"]),
        "container": _counts(videos["container"]),
        "width × height": Counter(f"{width} × {height}" for width, height in sizes),
        "audio": _counts(videos["audio"]),
        "rotation": _counts(videos["rotation"]),
        "number of frames from": _counts(videos["frames_from"]),
    }
    return [table([[title, "videos"], *_lines(counts)]) for title, counts in counted.items()]


def _counts(column: pa.ChunkedArray) -> Counter[str]:
    return Counter(
        {
            "none" if line["values"] is None else str(line["values"]): line["counts"]
            for line in column.value_counts().to_pylist()
        }
    )


def _lines(counts: Counter[str]) -> list[list[str]]:
    common = counts.most_common(MAX_LINES)
    lines = [[value, f"{count:,}"] for value, count in common]
    if others := counts.total() - sum(count for _, count in common):
        lines.append(["others", f"{others:,}"])
    return lines


def _duplicates(listed: Path) -> list[str]:
    if not listed.is_file():
        return []
    from pyarrow import csv

    found = csv.read_csv(listed)
    title = "<h2>Near-duplicates</h2>"
    if not len(found):
        return [title, "<p>None.</p>"]
    lines = [[row["path"], row["duplicate_of"], str(row["distance"])] for row in found[:MAX_LINES].to_pylist()]
    originals = pc.count_distinct(found["duplicate_of"]).as_py()
    text = f"{len(found):,} videos look like one of {originals:,} others (complete list: {listed.name})."
    return [title, f"<p>{escape(text)}</p>", table([["video", "like", "bits that differ"], *lines])]


def _thumbnails(index: Path, videos: pa.Table, number: int) -> list[str]:
    if not number:
        return []
    chosen = np.random.default_rng(0).permutation(len(videos))[:number]
    pictures = [
        picture for row in np.sort(chosen).tolist() if (picture := _thumbnail(index, videos["path"][row].as_py()))
    ]
    if not pictures:
        return []
    rows = [pictures[start : start + THUMBNAILS_IN_ROW] for start in range(0, len(pictures), THUMBNAILS_IN_ROW)]
    canvas = figures.stack([_row(row) for row in rows], gap=4)
    caption = f"The middle frames of {len(pictures)} videos, drawn at random."
    return ["<h2>Examples</h2>", figure(Picture("thumbnails", caption, figures.to_png(canvas)))]


def _thumbnail(index: Path, path: str) -> Image.Image | None:
    """Return the middle frame of a video, small; None where it cannot be decoded any more."""
    path = str(index.parent / path)
    try:
        video = open_video(path, "pyav")
        frame = read_frames(video, np.array([video.num_frames // 2]), path)[0]
    except VideoError:
        return None
    width = min(MAX_THUMBNAIL_WIDTH, max(1, round(frame.shape[1] * THUMBNAIL_HEIGHT / frame.shape[0])))
    return Image.fromarray(frame).resize((width, THUMBNAIL_HEIGHT), Image.Resampling.LANCZOS)


def _row(pictures: list[Image.Image]) -> Image.Image:
    row = Image.new("RGBA", (sum(p.width + 4 for p in pictures) - 4, THUMBNAIL_HEIGHT))
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + 4
    return row
