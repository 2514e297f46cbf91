"""Several texts that share a clip, against each text with a clip of its own."""

from collections import Counter

import pytest
import torch

from app.language.data import read_lists
from app.language.model import build_model, build_text_encoder
from app.language.options import Options
from app.language.videos import Features, training_videos
from tests.language.runs import results, run
from tubelet.config import ConfigError, check
from tubelet.data import Draw
from tubelet.data.collate import collate
from tubelet.language.dataset import _groups
from tubelet.probing.encoder import with_normalization
from tubelet.runtime.distributed import World

TRAINED = {"train_encoder": True}


def test_groups_have_each_text_once_and_are_filled_with_texts_of_the_same_video():
    paths = [*"abacaab"]
    for size in (1, 2, 3, 5):
        groups = _groups(paths, size)
        assert {len(group) for group in groups} == {size}
        assert all(len({paths[number] for number in group}) == 1 for group in groups)
        counts = Counter(number for group in groups for number in group)
        assert set(counts) == set(range(7))
        assert len(groups) == sum(-(-paths.count(path) // size) for path in "abc")
    assert _groups(paths, 2) == [[0, 2], [4, 5], [1, 6], [3, 3]]


@pytest.mark.parametrize("answers", ["generated", "classified"])
def test_loss_and_gradients_are_those_of_texts_with_a_clip_each(raw, answers):
    def options_with(texts_per_video):
        sections = {"data": {"texts_per_video": texts_per_video}, "answers": {"kind": answers}, **TRAINED}
        return with_normalization(check(raw("question_answering", **sections), Options, "test.yaml"))

    shared, apart = options_with(3), options_with(1)
    lists = read_lists(shared)
    text = build_text_encoder(shared, lists.texts(), World())
    found = {}
    for options in (shared, apart):
        videos = training_videos(options, lists.train_samples(), text, Features(None, {}))
        samples = len(lists.train_samples()) // options.data.texts_per_video
        assert len(videos) == samples
        batch = collate([videos[Draw(0, 0, index, index)] for index in range(samples)], 0)
        model = build_model(options, text, lists.answers)
        loss = model(batch, rng=None)["loss"]
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[len(batch.clips)] = loss.detach(), gradients
    (clips, (loss, gradients)), (more_clips, (expected, expected_gradients)) = sorted(found.items())
    assert more_clips == 3 * clips
    torch.testing.assert_close(loss, expected)
    assert any(name.startswith("encoder.") for name in gradients)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-6, rtol=1e-4)


def test_training(raw):
    run(raw(data={"texts_per_video": 2}, optimization={"batch_size": 4, "num_epochs": 4}, **TRAINED))
    found = results(raw()["folder"])
    assert found["num_train"] == 12  # clips; 24 captions


def test_retrieval_is_refused(raw):
    with pytest.raises(
        ConfigError, match=r"data.texts_per_video: retrieval compares a video with one text; set it to 1"
    ):
        check(raw("retrieval", data={"texts_per_video": 2}), Options, "test.yaml")
