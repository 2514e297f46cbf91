from collections import Counter
from pathlib import Path

import pytest

from tubelet.config import ConfigError
from tubelet.data.sources import NO_LABEL, read_list
from tubelet.data.thermal_actions import ACTIONS, write_lists

DATES = ("20170203", "20170206", "20170209", "20170210")


@pytest.fixture
def copy_of_the_set(tmp_path):
    """Two clips of each action and date, not in the order of the dates, and three recordings of each date."""
    source = tmp_path / "thermal"
    for folder in ("clips", "sequences"):
        (source / folder).mkdir(parents=True)
    lines = ["file,action,subject,date,sequence,first_frame,end_frame"]
    for number in range(2 * len(ACTIONS) * len(DATES)):
        date, action = DATES[-1 - number % 4], ACTIONS[number // 4 % 7]
        lines.append(f"clips/{number:04}.mp4,{action},human1,{date},{date}_p1_light1.mp4,0,16")
        (source / "clips" / f"{number:04}.mp4").touch()
    for date in DATES:
        for name in ("p1_light1", "p1_dark1", "p10_light1"):
            (source / "sequences" / f"{date}_{name}.mp4").touch()
    (source / "labels.csv").write_text("\n".join(lines) + "\n")
    return source


def read(lists, fold):
    return (read_list(lists / f"fold{fold}_{part}.csv") for part in ("pretrain", "train", "test"))


def test_each_fold_leaves_out_a_date_with_and_without_labels(copy_of_the_set, tmp_path):
    write_lists(copy_of_the_set, tmp_path / "lists")
    rows = [line.split(",") for line in (copy_of_the_set / "labels.csv").read_text().splitlines()[1:]]
    table = {str(copy_of_the_set / file): (ACTIONS.index(action), date) for file, action, _, date, *_ in rows}
    tested = []
    for fold, date in enumerate(DATES):
        pretrain, train, test = read(tmp_path / "lists", fold)
        for part, dates in ((train, set(DATES) - {date}), (test, {date})):
            assert {table[path][1] for path in part.paths} == dates
            assert part.labels == [table[path][0] for path in part.paths]
            assert set(Counter(part.labels).values()) == {2 * len(dates)}
        recordings = [Path(path).relative_to(copy_of_the_set / "sequences").name for path in pretrain.paths]
        assert {name[:8] for name in recordings} == set(DATES) - {date}
        assert (len(recordings), set(pretrain.labels)) == (9, {NO_LABEL})
        tested += test.paths
    assert sorted(tested) == sorted(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source: (source / "labels.csv").unlink(), r"labels\.csv does not exist"),
        (lambda source: (source / "labels.csv").write_text("file,label\n"), "no column action, date"),
        (
            lambda source: (source / "labels.csv").write_text("file,action,date\na.mp4,jump,20170203\n"),
            "unknown action jump; expected walk",
        ),
        (lambda source: [p.unlink() for p in (source / "sequences").glob("20170206*")], "no <date>.* of 20170206"),
    ],
)
def test_other_folders_are_an_error(copy_of_the_set, tmp_path, change, message):
    change(copy_of_the_set)
    with pytest.raises(ConfigError, match=message):
        write_lists(copy_of_the_set, tmp_path / "lists")


def test_lists_of_the_real_set(shared_data, tmp_path):
    if not (shared_data / "fir").is_dir():
        pytest.skip(f"{shared_data / 'fir'} does not exist")
    write_lists(shared_data / "fir", tmp_path)
    sizes = []
    for fold, date in enumerate(DATES):
        pretrain, train, test = read(tmp_path, fold)
        sizes.append((len(pretrain.paths), len(train.paths), len(test.paths)))
        assert {Path(path).name[:8] for path in pretrain.paths} == set(DATES) - {date}
        assert set(Counter(train.labels).values()) == {len(train.paths) // 7}
    assert sizes == [(300, 1960, 560)] * 3 + [(300, 1680, 840)]
