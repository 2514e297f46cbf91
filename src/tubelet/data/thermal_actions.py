"""Lists for four-fold cross-validation on MURA lab's Low-Resolution FIR Action Dataset, for pretraining and probing.

Seven actions under a thermal camera of 16 × 16 pixels on the ceiling (github.com/muralab, repository
Low-Resolution-FIR-Action-Dataset, CC BY-NC-SA 4.0). `labels.csv` has the file, action and date of each clip,
`sequences/` the recordings that the clips were cut from, whose names begin with the date. The test clips of a fold are
those of one date. Each person was recorded on one date only, so the training lists have nothing of the test date, and
the pretraining lists are the recordings of the other dates.
"""

from pathlib import Path

from tubelet.config import ConfigError
from tubelet.data.sources import read_table, write_list

ACTIONS = ("walk", "sitdown", "standup", "sit", "stand", "lie", "fall")
"""The label of a clip is the index of its action."""


def write_lists(source: Path, target: Path) -> None:
    """Write `fold<k>_{pretrain,train,test}.csv` to the folder `target`; fold k tests on the k-th date.

    Args:
        source: Folder of the data set.
        target: Folder of the lists.

    Raises:
        ConfigError: `source` is not the folder of the data set, or a date has no recording.
    """
    table = source / "labels.csv"
    rows = read_table(table, ("file", "action", "date"), "the thermal actions")
    if unknown := {row["action"] for row in rows} - set(ACTIONS):
        raise ConfigError(f"{table}: unknown action {', '.join(sorted(unknown))}; expected {', '.join(ACTIONS)}")
    sequences = sorted((source / "sequences").glob("*.mp4"))
    dates = sorted({row["date"] for row in rows})
    if missing := set(dates) - {_date_of(path) for path in sequences}:
        raise ConfigError(f"{source / 'sequences'}: no <date>_*.mp4 of {', '.join(sorted(missing))}")
    target.mkdir(parents=True, exist_ok=True)
    for fold, date in enumerate(dates):
        for part, chosen in (
            ("test", [row for row in rows if row["date"] == date]),
            ("train", [row for row in rows if row["date"] != date]),
        ):
            labels = [ACTIONS.index(row["action"]) for row in chosen]
            write_list(target / f"fold{fold}_{part}.csv", [source / row["file"] for row in chosen], labels)
        training = [path for path in sequences if _date_of(path) != date and _date_of(path) in dates]
        write_list(target / f"fold{fold}_pretrain.csv", training)


def _date_of(sequence: Path) -> str:
    return sequence.name.partition("_")[0]
