"""Clusters of stored features, and their agreement with labels. `python -m evals.main --fname <yaml>`."""

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from tubelet.config import ConfigError, dump
from tubelet.data import Decoder
from tubelet.features.clustering import Clusters, agreement, kmeans
from tubelet.features.options import ItemsConfig
from tubelet.features.store import Items, open_items
from tubelet.probing import neighbors
from tubelet.runtime.distributed import World
from tubelet.runtime.files import replacing, write_atomic, write_json


class Options(ItemsConfig):
    eval_name: Literal["clustering"]
    clusters: int = Field(ge=1)
    """Number of clusters."""
    restarts: int = Field(10, ge=1)
    """Starts, of which the one with the smallest inertia is kept."""
    normalize: bool = True
    """Cluster directions: subtract the mean of all vectors and divide by the norm. False: the vectors as they are."""
    seed: int = Field(0, ge=0)
    """Seed of the starts."""
    page_examples: int = Field(6, ge=0)
    """Examples of each cluster on the page, those nearest to its center."""
    page_clusters: int = Field(50, ge=0)
    """Clusters on the page, the largest ones."""
    decoder: Decoder = Decoder()


def main(options: Options, world: World) -> None:
    """Writes `clusters.parquet`, `results.json` and `clusters.html` into `options.folder`; rank 0 does all of it."""
    if not world.is_main:
        return
    items, _, description = open_items(options)
    if options.clusters > len(items):
        raise ConfigError(f"clusters: {options.clusters} is more than the {len(items)} vectors of {options.features}")
    vectors = items.vectors.to(world.device)
    if options.normalize:
        vectors = neighbors.directions(vectors, vectors.mean(0))
    found = kmeans(vectors, options.clusters, options.seed, restarts=options.restarts)
    found = Clusters(found.assignment.cpu(), found.centers.cpu(), found.distances.cpu(), found.inertia)
    measured: dict[str, Any] = {
        "num_vectors": len(items),
        "inertia": found.inertia,
        "sizes": found.assignment.bincount(minlength=options.clusters).tolist(),
        "encoder": description["encoder"],
    }
    if items.labels.min() >= 0:
        measured |= agreement(found.assignment, items.labels)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", dump(options))
    columns = {"path": items.paths, "label": items.labels.numpy(), "start": items.starts, "end": items.ends}
    columns |= {"cluster": found.assignment.numpy(), "distance": found.distances.numpy()}
    with replacing(folder / "clusters.parquet") as temporary:
        pq.write_table(pa.table(columns), temporary)
    write_json(folder / "results.json", measured)
    _write_page(options, folder / "clusters.html", items, found, measured)


def _write_page(options: Options, path: Path, items: Items, found: Clusters, measured: dict[str, Any]) -> None:
    from tubelet.features.strips import Strips  # matplotlib takes a second to import
    from tubelet.report import html_parts

    strips, sections = Strips(options.decoder), []
    largest = sorted(range(options.clusters), key=lambda cluster: -measured["sizes"][cluster])
    for cluster in largest[: options.page_clusters]:
        members = (found.assignment == cluster).nonzero()[:, 0]
        nearest = members[found.distances[members].argsort(stable=True)][: options.page_examples]
        sections.append(f"<h2>Cluster {cluster}: {len(members)}</h2>")
        sections.append(strips.row(items, [(item, items.caption(item)) for item in nearest.tolist()]))
    scores = [[name, f"{measured[name]:.4f}"] for name in ("purity", "nmi", "inertia") if name in measured]
    intro = "Examples of each cluster, those nearest to its center; the largest clusters first."
    sections = [f"<p>{intro}</p>", html_parts.table([["", "value"], *scores]), *strips.notes(), *sections]
    write_atomic(path, html_parts.document("Clusters", sections))
