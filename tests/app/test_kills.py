"""Programs that are killed at random moments end with the same results; for more kills: `python -m tests.kills`."""

import random

import pytest

from tests import kills

NAMES = ("train1", "train2", "probe", "features", "index", "pack")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_a_program_that_is_killed_ends_with_the_results_of_one_that_is_not(tmp_path, name):
    kills.adopt_orphans()
    scenario = next(scenario for scenario in kills.scenarios(tmp_path) if scenario.name == name)
    (tmp_path / "runs").mkdir()
    outcome = kills.torture(scenario, tmp_path / "runs", 4, random.Random(0))
    assert outcome.kills.total() == 4
    assert not outcome.problems, "\n".join(outcome.problems)
