"""Each kind of collapse on features made by hand, and what is not a collapse."""

import math

import pytest
import torch

from tubelet.training.collapse import KINDS, CollapseDetector, Measurement
from tubelet.training.feature_statistics import TokenMoments, summarize

CLIPS, SLOTS, PATCHES, WIDTH = 128, 4, 9, 48
REMEDIES = {"any": ["raise objective.weight"], "temporal": ["lower objective.time"]}


def features(seed=0):
    """Tokens [n, t, h·w, D]: a common vector, position embeddings, and content of clip, time slot and token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, WIDTH, generator=generator)

    position = normal(1, SLOTS, PATCHES)
    return 0.5 + position + normal(CLIPS, 1, 1) + normal(CLIPS, SLOTS, 1) + normal(CLIPS, SLOTS, PATCHES)


def figures(tokens):
    return summarize(TokenMoments.of(tokens.flatten(1, 2), slots=SLOTS), torch.full((CLIPS,), -1))


def few_directions(tokens):
    """Keep the two first dimensions of what tells the mean features of clips apart."""
    content = tokens.mean((1, 2), keepdim=True) - tokens.mean((0, 1, 2))
    return tokens - content * (torch.arange(WIDTH) >= 2)


COLLAPSED = {
    "complete": lambda tokens: 1 + 0.03 * tokens,
    "drift": lambda tokens: 10 + tokens,
    "dimensional": few_directions,
    "temporal": lambda tokens: tokens - tokens.mean(2, keepdim=True) + tokens.mean((1, 2), keepdim=True),
    "token": lambda tokens: tokens.mean((1, 2), keepdim=True).expand_as(tokens),
}
HARMLESS = {
    "other clips": lambda tokens: features(seed=1),
    "larger": lambda tokens: 30 * tokens,
    "rotated": lambda tokens: tokens @ torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0],
    "without position embeddings": lambda tokens: tokens - tokens.mean(0),
    "common vector": lambda tokens: 1 + tokens,
    "fewer tokens' differences": lambda tokens: tokens + 2 * tokens.mean((1, 2), keepdim=True),
}


def detector():
    started = CollapseDetector(REMEDIES)
    assert not started.update(Measurement(0, figures(features())))
    return started


def test_every_kind_has_a_test():
    assert COLLAPSED.keys() == {kind.name for kind in KINDS}


@pytest.mark.parametrize("kind", COLLAPSED)
def test_collapse_is_told_by_its_kind_once(kind):
    watched = detector()
    assert not watched.update(Measurement(50, figures(features(seed=1)), loss=2.0))
    after = figures(COLLAPSED[kind](features()))
    found = watched.update(Measurement(100, after, loss=0.5))
    assert list(found) == [kind]
    assert f"{kind} collapse after step 100" in found[kind]
    assert "raise objective.weight; lower optimization.lr" in found[kind]
    assert ("lower objective.time" in found[kind]) == (kind == "temporal")
    assert not watched.update(Measurement(150, after, loss=0.5))


@pytest.mark.parametrize("change", HARMLESS)
def test_healthy_features_raise_nothing(change):
    assert not detector().update(Measurement(100, figures(HARMLESS[change](features())), loss=0.1))


def test_position_embeddings_do_not_hide_equal_tokens():
    """Tokens that depend on the clip and on their position, but not on what is there."""
    tokens = features()
    position = tokens.mean(0)
    clip = (tokens - position).mean((1, 2), keepdim=True)
    assert list(detector().update(Measurement(100, figures(position + clip)))) == ["token"]


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ((2.0, 0.5), "The loss went from 2 to 0.5 meanwhile: it fell because the features lost information"),
        ((0.5, 2.0), "The loss went from 0.5 to 2 meanwhile. Remedies"),
        ((None, None), ". Remedies"),
    ],
)
def test_message_says_what_the_loss_did(losses, text):
    watched = detector()
    watched.update(Measurement(50, figures(features()), losses[0]))
    message = watched.update(Measurement(100, figures(few_directions(features())), losses[1]))["dimensional"]
    assert text in message
    assert "(at the start 0.9" in message


def test_a_loss_that_falls_with_the_features_is_a_partial_collapse():
    """A quarter of the residual variance is left, and what the loss did tells collapse from learning."""
    start = {**figures(features()), "residual_variance": 0.8}
    for left, loss, kinds in ((0.2, 1.5, []), (0.2, 0.5, []), (0.2, 0.1, ["dimensional"]), (0.7, 0.001, [])):
        watched = CollapseDetector()
        watched.update(Measurement(0, start))
        watched.update(Measurement(50, start, loss=1.0))
        assert list(watched.update(Measurement(100, {**start, "residual_variance": left}, loss))) == kinds


def test_a_loss_that_falls_while_the_features_gain_is_learning():
    start = figures(features())
    gained = {**start, "residual_variance": 0.97, "spread_across": 1.5 * start["spread_across"]}
    watched = CollapseDetector()
    watched.update(Measurement(0, start))
    watched.update(Measurement(50, start, loss=1.0))
    assert not watched.update(Measurement(100, gained, loss=0.001))


def test_directions_that_training_gained_can_be_lost():
    """The same value as at the start is a collapse after a much higher one."""
    start = {**figures(features()), "residual_variance": 0.05}
    watched = CollapseDetector()
    watched.update(Measurement(0, start))
    assert not watched.update(Measurement(100, {**start, "residual_variance": 0.9}))
    message = watched.update(Measurement(200, start))["dimensional"]
    assert "after step 100" in message


def test_fixed_targets_may_need_few_directions():
    """Labels of a few classes do; what they do not need is that the features become one vector."""
    watched = CollapseDetector(fixed_targets=True)
    watched.update(Measurement(0, figures(features())))
    watched.update(Measurement(50, figures(features()), loss=2.0))
    assert not watched.update(Measurement(100, figures(few_directions(features())), loss=1.0))
    message = watched.update(Measurement(150, figures(1 + 0.03 * features()), loss=1.9))["complete"]
    assert "The loss went from 2 to 1.9 meanwhile. Remedies" in message


def test_unknown_figures_are_no_collapse():
    start = figures(features())
    for unknown in (None, math.nan):
        watched = CollapseDetector()
        watched.update(Measurement(0, dict.fromkeys(start, unknown)))
        watched.update(Measurement(50, start))
        assert not watched.update(Measurement(100, dict.fromkeys(start, unknown)))
    old = {name: start[name] for name in ("rank_centered", "rank_uncentered", "spread_within", "spread_across")}
    watched = CollapseDetector()
    watched.update(Measurement(0, old))
    assert list(watched.update(Measurement(50, {**old, "spread_across": 0.0}))) == ["complete"]


def test_restored_from_a_log_it_goes_on_as_before():
    healthy, collapsed = figures(features()), figures(few_directions(features()))
    log = [{"step": 0, **healthy}, {"step": 1, "loss": 3.0}]
    log += [{"step": 2, "loss": 1.0, **healthy}, {"step": 3, "loss": 5.0}]
    straight = CollapseDetector()
    straight.update(Measurement(0, healthy))
    straight.update(Measurement(2, healthy, 2.0))
    resumed = CollapseDetector()
    assert resumed.restore(log) == [5.0]
    assert resumed.update(Measurement(4, collapsed, 1.0)) == straight.update(Measurement(4, collapsed, 1.0)) != {}
    again = CollapseDetector()
    again.restore([*log, {"step": 4, "loss": 1.0, **collapsed, "events": {"dimensional": "message"}}])
    assert not again.update(Measurement(5, collapsed, 1.0))
