"""Lists for ten-fold cross-validation on UT-Interaction (Ryoo & Aggarwal, SDHA 2010), for pretraining and probing.

`labels.csv` has the path, label, sequence and fold of each clip. The test clips of a fold are those of two sequences (q
of set 1 and q + 10 of set 2). All clips of a sequence have the same actors and background, so none of them may be in a
training list.

The clips in `unlabelled/` were cut from set 1, too: `set1_<number>_<sequence>_6.mp4`. Those of a held-out sequence show
the same actors and background as the test clips, so the pretraining list of the fold excludes them as well.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from tubelet.config import ConfigError

NUM_CLASSES = 6
NUM_FOLDS = 10


def write_lists(source: Path, target: Path) -> None:
    """Write `fold<k>_{pretrain,train,test}.csv` for each fold to the folder `target`.

    Args:
        source: Folder of the data set.
        target: Folder of the lists.

    Raises:
        ConfigError: `source` is not the folder of UT-Interaction.
    """
    table = source / "labels.csv"
    if not table.is_file():
        raise ConfigError(f"{table} does not exist; give the folder of UT-Interaction that contains labels.csv")
    with open(table, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"path", "label", "sequence", "fold10"} - set(reader.fieldnames or ()):
            raise ConfigError(
                f"{table} has no column {', '.join(sorted(missing))}; it is not the table of UT-Interaction"
            )
        rows = list(reader)
    unlabelled = sorted((source / "unlabelled").glob("*.mp4"))
    target.mkdir(parents=True, exist_ok=True)
    for fold in range(NUM_FOLDS):
        test = [row for row in rows if int(row["fold10"]) == fold]
        train = [row for row in rows if int(row["fold10"]) != fold]
        held_out = {row["sequence"] for row in test}
        extra = [path for path in unlabelled if sequence_of(path) not in held_out]
        _write(target / f"fold{fold}_test.csv", [(source / row["path"], row["label"]) for row in test])
        _write(target / f"fold{fold}_train.csv", [(source / row["path"], row["label"]) for row in train])
        without_labels = [(source / row["path"], None) for row in train] + [(path, None) for path in extra]
        _write(target / f"fold{fold}_pretrain.csv", without_labels)


def sequence_of(unlabelled: Path) -> str:
    """The sequence of set 1 that an unlabeled clip was cut from.

    Raises:
        ConfigError: The file name has another format.
    """
    match = re.fullmatch(r"set1_\d+_(\d+)_6", unlabelled.stem)
    if match is None:
        raise ConfigError(f"{unlabelled}: expected a name like set1_100_4_6.mp4, whose third part is the sequence")
    return match[1]


def _write(path: Path, entries: Sequence[tuple[Path, str | None]]) -> None:
    lines = [f'"{video.absolute()}"' + ("" if label is None else f"\t{label}") for video, label in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
