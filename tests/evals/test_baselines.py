import json

import pytest

from evals.baselines import eval as program
from tubelet.config import ConfigError, check
from tubelet.runtime.distributed import World


def run(folder, **task):
    raw = {
        "eval_name": "baselines",
        "folder": str(folder),
        "num_frames": 2,
        "tasks": {"motion": {"num_classes": 3, **task}},
    }
    program.main(check(raw, program.Options, "test.yaml"), World())
    return json.loads((folder / "results.json").read_text())


def test_names_of_classes_are_numbered_alike_in_both_lists(labelled, tmp_path, caplog):
    numbers, names = {}, {}
    for key, split in (("train", "train"), ("test", "val")):
        lines = [line.rsplit(" ", 1) for line in (labelled / f"{split}.csv").read_text().splitlines()]
        kept = [(path, int(label)) for path, label in lines if key == "train" or label != "1"]
        for lists, of_label in ((numbers, str), (names, ["cat", "dog", "eel"].__getitem__)):
            path = tmp_path / f"{key}-{of_label(0)}.csv"
            path.write_text("".join(f"{path} {of_label(label)}\n" for path, label in kept))
            lists[key] = str(path)
    assert run(tmp_path / "a", **numbers) == run(tmp_path / "b", **names)
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"^tasks\.motion: .* does not name classes, as other lists do"):
        run(tmp_path / "c", train=names["train"], test=numbers["test"])


def test_a_wrong_list_is_reported_under_its_own_key(labelled, tmp_path):
    with pytest.raises(ConfigError, match=r"^tasks\.motion\.test: gone\.csv: No such file"):
        run(tmp_path, train=str(labelled / "train.csv"), test="gone.csv")
