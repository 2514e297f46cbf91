"""Retrieval where several videos have the same caption, and a video has several captions."""

import pytest
import torch

from app.language.data import read_lists
from app.language.model import build_model, build_text_encoder
from app.language.options import Options
from app.language.videos import Features, training_videos
from tests.language.runs import edited, run
from tubelet.config import ConfigError, check
from tubelet.data import Draw
from tubelet.data.collate import collate
from tubelet.probing.encoder import with_normalization
from tubelet.runtime.distributed import World


@pytest.fixture
def captions(scenes, tmp_path):
    """Captions of which four videos share one, and two others have some that differ only where they are cut."""

    def change(content):
        rows = content["sentences"]
        videos = list(dict.fromkeys(row["video_id"] for row in rows))
        shared = [{"video_id": video, "caption": "a red circle"} for video in videos[:4]]
        cut = [{"video_id": video, "caption": f"{'red ' * 20}{video}"} for video in videos[4:6]]
        return {**content, "sentences": rows[:8] + shared + cut}

    return edited(scenes / "captions_train.json", tmp_path / "captions.json", change)


def batch_of(options, text, lists):
    videos = training_videos(options, lists.train_samples(), text, Features(None, {}))
    return collate([videos[Draw(0, 0, index, index)] for index in range(len(videos))], 0)


@pytest.fixture
def read(raw, captions):
    sections = {"data": {"dataset_train": captions}, "text": {"max_target": 6}, "train_encoder": True}
    options = with_normalization(check(raw("retrieval", **sections), Options, "test.yaml"))
    lists = read_lists(options)
    return options, build_text_encoder(options, lists.texts(), World()), lists


def test_numbers_tell_which_videos_and_texts_are_equal(read):
    options, text, lists = read
    batch = batch_of(options, text, lists)
    samples = lists.train_samples()
    numbers = {name: batch.tensor(name)[:, 0].tolist() for name in ("video_number", "text_number")}
    tokens = text.targets([sample.target for sample in samples])
    for i, sample in enumerate(samples):
        for j, other in enumerate(samples):
            assert (numbers["video_number"][i] == numbers["video_number"][j]) == (sample.path == other.path)
            assert (numbers["text_number"][i] == numbers["text_number"][j]) == torch.equal(tokens[i], tokens[j])
    counts = [numbers["text_number"].count(number) for number in numbers["text_number"]]
    assert counts.count(4) == 4
    assert numbers["text_number"][-1] == numbers["text_number"][-2]


def test_the_objective_leaves_out_what_is_equal(read):
    options, text, lists = read
    batch, samples = batch_of(options, text, lists), lists.train_samples()
    model = build_model(options, text, lists.answers)
    loss = model(batch, rng=None)["loss"]
    with torch.no_grad():
        videos, texts = model.embed_videos(batch), model.embed_texts(batch.tensor("target")[:, 0])
        assert loss.item() != pytest.approx(model.contrastive(videos, texts).item(), rel=1e-3)
        logits = (
            torch.nn.functional.cosine_similarity(videos[:, None], texts[None], dim=-1) / options.alignment.temperature
        )
    targets = [tuple(row) for row in text.targets([sample.target for sample in samples]).tolist()]
    pairs = {(sample.path, target) for sample, target in zip(samples, targets, strict=True)}
    total = 0.0
    for i, sample in enumerate(samples):
        of_video = [j for j in range(len(samples)) if i == j or (sample.path, targets[j]) not in pairs]
        of_text = [j for j in range(len(samples)) if i == j or (samples[j].path, targets[i]) not in pairs]
        total += float(logits[i, of_video].logsumexp(0) + logits[of_text, i].logsumexp(0) - 2 * logits[i, i])
    assert loss.item() == pytest.approx(total / (2 * len(samples)), rel=1e-4)


def test_one_caption_for_all_videos_is_refused(raw, scenes, tmp_path):
    """All videos are right for it, so the loss would be zero."""

    def change(content):
        return {**content, "sentences": [{**row, "caption": "a video"} for row in content["sentences"]]}

    listed = edited(scenes / "captions_train.json", tmp_path / "captions.json", change)
    with pytest.raises(ConfigError, match=r"data\.dataset_train: all texts are equal .*text\.max_target"):
        run(raw("retrieval", data={"dataset_train": listed}))
