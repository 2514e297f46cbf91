"""Every encoder beside every other: `python -m app.zoo --fname configs/study/zoo.yaml [key.path=value ...]`.

Each YAML of a folder names an encoder. It is measured, trained from scratch with labels and, where it can work on a
subset of the tokens, pretrained without labels and probed beside its random self: a study of its own (`app.study`) on
clips that all share. The same command goes on after a stop.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from app.study import plan as study_plan
from app.study.options import Options as Study
from app.study.results import summarise
from app.zoo.measure import build
from tubelet import config
from tubelet.config import Config, ConfigError
from tubelet.report import aggregate
from tubelet.runtime import jobs
from tubelet.runtime.jobs import Job

BASE = "base.yaml"  # what the encoders' files share
FACTS = {
    "parameters": ("M params", 1e6),
    "flops": ("GFLOP", 1e9),
    "bytes": ("MB kept", 1e6),
    "clips_per_second": ("clips/s", 1),
}
ACCURACIES = {
    "labels": ("probe", "supervised"),
    "random": ("probe", "random_best"),
    "pretrained": ("probe", "pretrained"),
    "random, linear": ("linear", "random_best"),
    "pretrained, linear": ("linear", "pretrained"),
}
LEGEND = """\
Of the encoder on one clip: parameters, FLOPs forward, bytes kept for the backward pass; clips/s forward and backward on
one core. Top-1 in % on the motion label: `labels` is trained from scratch with all labelled clips; `random` and
`pretrained` are frozen and read out by an attentive probe or linearly from the mean token, `random` is the best of the
initialisation scales. "-": needs all tokens, so it cannot be pretrained by hiding some."""


class Options(Config):
    folder: str
    encoders: str
    """Folder with a pretraining YAML for each encoder."""
    only: list[str] = []
    """Names of the encoders to take, by default all."""
    clips: dict[str, int]
    study: dict[str, Any]
    """Options of `app.study`, for each encoder; {zoo} in them is this program's folder."""
    special: dict[str, dict[str, Any]] = {}
    """What differs in the study of single encoders."""
    processes: int = Field(2, ge=1)
    threads: int = Field(1, ge=1)


def run(options: Options) -> None:
    """Do what is not done yet, print the table and write it to zoo.json."""
    folder = Path(options.folder)
    files = encoder_files(options)
    studies = {name: study_of(options, name, path) for name, path in files.items()}
    planned = plan(options, files, studies)
    print(f"{len(files)} encoders, {len(planned)} jobs, {options.processes} at a time; logs in {folder}")
    jobs.Pool(options.processes, options.threads, study_plan.PROGRAMS).run(planned)
    found = {name: row(options, name, study) for name, study in studies.items()}
    floors = summarise(floors_study(options))["probe"]
    (folder / "zoo.json").write_text(json.dumps({"encoders": found, "floors": floors}, indent=1), encoding="utf-8")
    print(f"\n{text_table(found)}\n\n{LEGEND}")
    for name, floor in floors.items():
        print(f"{aggregate.ROWS[name]}: {aggregate.text_cell(floor['motion'])}")


def encoder_files(options: Options) -> dict[str, Path]:
    """Name -> YAML of each encoder. Raises ConfigError for an empty folder or a name that it lacks."""
    found = {path.stem: path for path in sorted(Path(options.encoders).glob("*.yaml")) if path.name != BASE}
    if not found:
        raise ConfigError(f"encoders: {options.encoders} holds no YAML of an encoder")
    for key, names in (("only", options.only), ("special", options.special)):
        for name in names:
            if name not in found:
                raise ConfigError(f"{key}: no '{name}' in {options.encoders}. {config.nearest(name, found)}")
    return {name: path for name, path in found.items() if not options.only or name in options.only}


def study_of(options: Options, name: str, path: Path) -> Study:
    """The study of one encoder; without pretraining and probes where it needs all tokens."""
    own = {"folder": f"{options.folder}/{name}", "pretrain": {"fname": str(path)}, "floors": None}
    raw = config.merge(config.merge(options.study, options.special.get(name, {})), own)
    with torch.device("meta"):  # to ask it takes no weights
        encoder = build(path)
    if not encoder.accepts_masks:
        raw = config.merge(raw, {"pretrain": {"seeds": []}, "random": {"seeds": []}})
    return config.check(_fill(raw, options.folder), Study, path)


def floors_study(options: Options) -> Study:
    """What needs no encoder."""
    path = next(iter(encoder_files(options).values()))
    own = {"folder": f"{options.folder}/floors", "pretrain": {"fname": str(path), "seeds": []}}
    raw = config.merge(options.study, {**own, "random": {"seeds": []}, "supervised": None})
    return config.check(_fill(raw, options.folder), Study, "floors")


def _fill(raw: dict[str, Any], folder: str) -> dict[str, Any]:
    return json.loads(json.dumps(raw).replace("{zoo}", folder))


def plan(options: Options, files: dict[str, Path], studies: dict[str, Study]) -> list[Job]:
    """Clips first, then the longest jobs; names carry the encoder's."""
    clips = study_plan.clips_job(options.folder, options.clips, options.processes)
    found = [_measure_job(options, name, path) for name, path in files.items()]
    for name, study in {**studies, "floors": floors_study(options)}.items():
        for job in study_plan.plan(study):
            after = tuple(f"{name}:{other}" for other in job.after) or (clips.name,)
            settings = {**job.settings, "clips": options.clips}
            found.append(replace(job, name=f"{name}:{job.name}", after=after, settings=settings))
    return [clips, *sorted(found, key=lambda job: -job.seconds)]


def _measure_job(options: Options, name: str, path: Path) -> Job:
    """Alone on the machine, as it takes times."""
    folder = Path(options.folder) / name / "facts"
    return Job(
        name=f"{name}:facts",
        stage="facts",
        command=("app.zoo.measure", "--fname", str(path), "--folder", str(folder)),
        folder=folder,
        settings=config.read(path),
        seconds=12,
        slots=options.processes,
    )


def row(options: Options, name: str, study: Study) -> dict[str, Any]:
    """What was measured of one encoder; accuracies are [mean, standard deviation] in percent."""
    facts = json.loads((Path(options.folder) / name / "facts" / "facts.json").read_text(encoding="utf-8"))
    report = summarise(study)
    cells = {name: report[head].get(row, {}).get("motion") for name, (head, row) in ACCURACIES.items()}
    return {**facts, **cells}


def text_table(found: dict[str, dict[str, Any]]) -> str:
    grid = [["encoder", *(title for title, _ in FACTS.values()), *ACCURACIES]]
    for name, cells in found.items():
        facts = [f"{cells[key] / unit:.3g}" for key, (_, unit) in FACTS.items()]
        grid.append([name, *facts, *(aggregate.text_cell(cells[key]) for key in ACCURACIES)])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in grid)


if __name__ == "__main__":
    jobs.main("app.zoo", __doc__, Options, run)
