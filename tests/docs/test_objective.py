"""The example of docs/extending/objective.md trains."""

import math

import pytest

from tests.docs.runs import make_options, train
from tubelet import hub
from tubelet.config import ConfigError

NAME = "ideas.masked_vicreg"


def test_objective_trains(checkout, clips):
    options = make_options(clips, objective={"name": NAME, "cov_coeff": 0.5})
    assert options.objective.model_dump() == {"name": NAME, "inv_coeff": 25.0, "cov_coeff": 0.5}
    first, last = train(options)
    assert first["loss"] == pytest.approx(25 * (first["loss_inv"] + first["loss_std"]) + 0.5 * first["loss_cov"])
    assert math.isfinite(last["loss"])
    assert last["loss"] != first["loss"]
    assert hub.load_encoder(options.folder).embed_dim == 48


def test_wrong_options_are_errors(checkout, clips):
    with pytest.raises(ConfigError, match=r"objective\.cov_coef: unknown key\. Did you mean 'cov_coeff'"):
        make_options(clips, objective={"name": NAME, "cov_coef": 0.5})
    with pytest.raises(ConfigError, match="needs at least 2 mask"):
        make_options(clips, objective=NAME, mask=[make_options(clips).mask[0].model_dump()])
