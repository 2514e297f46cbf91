"""The nearest videos in stored features, as a table and a page. `python -m evals.main --fname <yaml>`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import Tensor

from tubelet.config import ConfigError, dump
from tubelet.data import Decoder, evenly_spaced
from tubelet.features.options import ItemsConfig
from tubelet.features.store import Items, open_items
from tubelet.probing import neighbors
from tubelet.runtime.distributed import World
from tubelet.runtime.files import replacing, write_atomic, write_json


class Options(ItemsConfig):
    eval_name: Literal["retrieval"]
    queries: str | None = None
    """Store of the queries; null: those of `features`, each searched among all other videos."""
    num_queries: int | None = Field(None, ge=1)
    """Queries, evenly spaced over the store; null: all."""
    k: int = Field(20, ge=1)
    """Neighbors of each query in `neighbors.parquet`."""
    recall: list[Annotated[int, Field(ge=1)]] = [1, 5, 10]
    """Numbers of neighbors of recall@k."""
    center: bool = True
    """Subtract the mean of `features` first."""
    page_queries: int = Field(12, ge=0)
    """Queries on the page, evenly spaced over all."""
    page_neighbors: int = Field(6, ge=1)
    """Neighbors of each query on the page."""
    decoder: Decoder = Decoder()


@dataclass(frozen=True)
class Found:
    """The neighbors that were found.

    Attributes:
        queries: Where the queries are from.
        gallery: Where their neighbors are from.
        chosen: int64 [Q], numbers of the queries among `queries`.
        similarity: [Q, k], cosines, best first.
        indices: int64 [Q, k], numbers of the neighbors among `gallery`.
    """

    queries: Items
    gallery: Items
    chosen: Tensor
    similarity: Tensor
    indices: Tensor


def main(options: Options, world: World) -> None:
    """Writes `neighbors.parquet`, `results.json` and `retrieval.html` into `options.folder`; rank 0 does all of it."""
    if not world.is_main:
        return
    gallery, other, description = open_items(options, options.queries)
    queries = gallery if other is None else other
    chosen = torch.arange(len(queries))
    if options.num_queries is not None:
        chosen = evenly_spaced(len(queries), options.num_queries)
    device = world.device
    mean = gallery.vectors.mean(0).to(device) if options.center else None
    searched = neighbors.directions(gallery.vectors.to(device), mean)
    asked = neighbors.directions(queries.vectors[chosen].to(device), mean)
    groups = None
    if other is None:
        groups = queries.videos[chosen].to(device), gallery.videos.to(device)
        if len(groups[1].unique()) < 2:
            raise ConfigError(f"features: {options.features} has a single video, which has no neighbors")
    similarity, indices = (tensor.cpu() for tensor in neighbors.nearest(asked, searched, options.k, groups))
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", dump(options))
    found = Found(queries, gallery, chosen, similarity, indices)
    _write_table(folder / "neighbors.parquet", found)
    measured: dict[str, Any] = {"queries": len(chosen), "gallery": len(gallery), "encoder": description["encoder"]}
    if min(queries.labels.min(), gallery.labels.min()) >= 0:
        labels = queries.labels[chosen].to(device), gallery.labels.to(device)
        measured |= neighbors.retrieval_scores(asked, searched, *labels, options.recall, groups)
    write_json(folder / "results.json", measured)
    _write_page(folder / "retrieval.html", found, measured, options)


def _write_table(path: Path, found: Found) -> None:
    """Write a row for each query and neighbor, best first."""
    count, k = found.indices.shape
    query, neighbor = found.chosen.repeat_interleave(k).numpy(), found.indices.flatten().numpy()
    columns: dict[str, Any] = {}
    for name, items, numbers in (("query", found.queries, query), ("neighbor", found.gallery, neighbor)):
        columns |= {
            name: [items.paths[i] for i in numbers],
            f"{name}_label": items.labels[numbers].numpy(),
            f"{name}_start": items.starts[numbers],
            f"{name}_end": items.ends[numbers],
        }
    columns |= {"rank": torch.arange(1, k + 1).repeat(count).numpy(), "similarity": found.similarity.flatten().numpy()}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _write_page(path: Path, found: Found, measured: dict[str, Any], options: Options) -> None:
    from tubelet.features.strips import Strips  # matplotlib takes a second to import
    from tubelet.report import html_parts

    strips, sections = Strips(options.decoder), []
    queries, gallery = found.queries, found.gallery
    for row in evenly_spaced(len(found.chosen), options.page_queries).tolist():
        query = int(found.chosen[row])
        sections.append(f"<h2>{html_parts.escape(Path(queries.paths[query]).name)}</h2>")
        sections.append(strips.row(queries, [(query, f"query, {queries.caption(query)}")]))
        nearest = zip(found.indices[row].tolist(), found.similarity[row].tolist(), strict=True)
        shown = [(item, f"{cosine:.3f}, {gallery.caption(item)}") for item, cosine in nearest]
        sections.append(strips.row(gallery, shown[: options.page_neighbors]))
    scores = [[name, f"{measured[name]:.4f}"] for name in measured if name.startswith("recall") or name == "map"]
    intro = "Each query, and below it its nearest neighbors with their cosine similarity, best first."
    table = html_parts.table([["", "value"], *scores]) if scores else ""
    sections = [f"<p>{intro}</p>", table, *strips.notes(), *sections]
    write_atomic(path, html_parts.document("Nearest videos", sections))
