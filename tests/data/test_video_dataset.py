import av
import numpy as np
import pytest
import torch

from tests.data.batches import load
from tubelet.config import ConfigError
from tubelet.data import AugConfig, BadFile, DataConfig, Draw, VideoError
from tubelet.data.bad_files import NoReplacement
from tubelet.data.collate import collate
from tubelet.data.loader import make_eval_loader
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import EvalTransform, TrainTransform
from tubelet.data.video_dataset import Dataset


def dataset(*sources, on_error="raise", transform=None, **changed):
    options = {"sampling_rate": 2, "num_frames": 4, "crop_size": 32} | changed
    data = DataConfig(datasets=[str(source) for source in sources], **options)
    return Dataset(data, transform or EvalTransform(32), seed=5, on_error=on_error)


def draw(index, epoch=0):
    return Draw(step=0, epoch=epoch, index=index, position=0)


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_frames_of_a_sample_are_those_it_names(videos, numbers_of, decoder):
    samples = dataset(videos, decoder=decoder, num_clips=2, transform=lambda clip, rng: torch.from_numpy(clip)[None])
    for index in range(len(samples)):
        sample = samples[draw(index)]
        for clip, frames in zip(sample.clips.numpy(), sample.frames.numpy(), strict=True):
            np.testing.assert_array_equal(numbers_of(clip), frames)
        assert (sample.path, sample.index, sample.targets["label"]) == (samples.paths[index], index, -1)


def test_sample_depends_on_seed_epoch_and_index_only(videos):
    samples = dataset(videos, transform=TrainTransform(AugConfig(), 32))
    first = samples[draw(3, epoch=2)]
    samples[draw(1)]
    again = samples[Draw(step=9, epoch=2, index=3, position=7)]
    assert torch.equal(first.clips, again.clips)
    assert not torch.equal(first.clips, samples[draw(3, epoch=3)].clips)


def test_the_cache_changes_nothing(videos, tmp_path):
    plain = dataset(videos, transform=TrainTransform(AugConfig(), 32))
    cached = dataset(videos, transform=TrainTransform(AugConfig(), 32), cache=str(tmp_path))
    for epoch in range(2):
        for index in range(len(plain)):
            one, two = plain[draw(index, epoch)], cached[draw(index, epoch)]
            assert torch.equal(one.clips, two.clips)
            assert torch.equal(one.frames, two.frames)


def test_several_clips_of_a_video_in_a_pass_differ(videos):
    samples = dataset(videos, clips_per_video=3)
    stream = SampleStream(samples.sizes, None, 2, seed=5, clips_per_sample=3)
    clips = [samples[one] for step in range(stream.steps_per_pass) for one in stream.draws(step)]
    assert sorted(clip.index for clip in clips) == sorted(3 * list(range(6)))
    assert len({tuple(clip.frames.flatten().tolist()) for clip in clips if clip.index == 5}) == 3


@pytest.mark.parametrize("rate", [{"fps": 5.0}, {"clip_duration": 6.4}])
@pytest.mark.parametrize(("name", "decoder"), [("v.mp4", "pyav"), ("v.mp4", "decord"), ("v.mp4", "torchcodec"),
                         ("v.mkv", "pyav"), ("v.ts", "decord"), ("live.webm", "pyav"), ("live.webm", "torchcodec"),
                         ("cached.mp4", "pyav")])  # fmt: skip
def test_clips_of_a_variable_rate_follow_its_times(name, decoder, rate, make_video, numbers_of, tmp_path):
    codec = {"codec": "libvpx", "options": {"crf": "4", "b": "4M"}} if name == "live.webm" else {}
    path = make_video(
        tmp_path / f"source.{name.split('.')[1]}", frames=60, **{"options": {"crf": "12", "bf": "0"}, **codec}
    )
    options = {"live": "1"} if name == "live.webm" else {}  # without duration, index and rate
    with av.open(path) as reader, av.open(str(tmp_path / name), "w", options=options) as writer:
        stream, first = writer.add_stream_from_template(reader.streams.video[0]), None
        for packet in reader.demux(video=0):
            if packet.size:  # 30 frames in a second, then one every 0.2 s
                first = packet.pts if first is None else first
                number = round((packet.pts - first) * packet.time_base * 30)
                shown = number if number < 30 else 30 + 6 * (number - 30)
                packet.pts = packet.dts = round(shown / 30 / packet.time_base)
                packet.stream = stream
                writer.mux(packet)
    options = {"sampling_rate": None, "random_clip_sampling": False, "num_frames": 32, "decoder": decoder, **rate}
    options |= {"cache": str(tmp_path / "cache")} if name == "cached.mp4" else {}
    try:
        samples = dataset(tmp_path / name, transform=lambda clip, rng: torch.from_numpy(clip)[None], **options)
    except ConfigError as error:
        pytest.skip(str(error))
    sample = samples[draw(0)]
    frames = sample.frames[0].numpy()
    assert frames[0] < 30 < frames[-1]
    times = np.concatenate([np.arange(30) / 30, 1 + np.arange(30) / 5])
    np.testing.assert_allclose(np.diff(times[frames]), 0.2)
    np.testing.assert_array_equal(numbers_of(sample.clips[0].numpy()), sample.frames[0])


def test_broken_video_is_replaced_by_another_of_its_source_and_reported(videos, broken_video, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{broken_video} 9\n" + "".join(f"{videos / name}.mp4 {i}\n" for i, name in enumerate("abc")))
    samples = dataset(videos, listed, on_error="replace")
    assert samples.sizes == [6, 4]
    seen = set()
    for epoch in range(12):
        sample = samples[draw(6, epoch)]
        assert {file.path for file in sample.bad} == {broken_video}
        assert "cannot decode frames" in sample.bad[0].reason
        assert sample.clips.shape == (1, 3, 4, 32, 32)
        assert sample.index in (7, 8, 9)
        assert sample.targets["label"] == sample.index - 7
        assert torch.equal(sample.clips, samples[draw(6, epoch)].clips)
        seen.add(sample.index)
    assert seen == {7, 8, 9}


def test_a_data_set_of_broken_videos_is_an_error_that_names_the_option(broken_video):
    with pytest.raises(
        NoReplacement, match=r"(?s)neither .*broken.mp4 nor 0 other .*max_bad_fraction 0.05.*cannot decode"
    ):
        dataset(broken_video, on_error="replace")[draw(0)]


@pytest.fixture
def few_good(videos, broken_video, tmp_path):
    """The list of 3 good and 60 bad files of two kinds: some cannot be opened, others not be decoded."""
    for number in range(40):
        (tmp_path / f"text {number}.mp4").write_text("not a video")
    bad = [str(tmp_path / f"text {number}.mp4") for number in range(40)]
    for number in range(20):
        (tmp_path / f"broken {number}.mp4").symlink_to(broken_video)
        bad.append(str(tmp_path / f"broken {number}.mp4"))
    listed = tmp_path / "list.csv"
    listed.write_text("".join(f"{path} 0\n" for path in [*bad, *(videos / f"{name}.mp4" for name in "abc")]))
    return listed


def test_all_files_may_be_tried_where_any_fraction_may_be_bad(few_good):
    options = {"on_error": "replace", "max_bad_fraction": 1.0}
    expected = load(dataset(few_good, **options), last=20)
    assert {index for batch in expected for index in batch.indices.tolist()} == {60, 61, 62}
    for workers, first in ((2, 0), (0, 7)):  # what is known of the files differs, the batches do not
        batches = load(
            dataset(few_good, on_error="replace", max_bad_fraction=1.0), workers=workers, first=first, last=20
        )
        for one, two in zip(expected[first:], batches, strict=True):
            assert torch.equal(one.clips, two.clips)
            assert (one.paths, one.bad) == (two.paths, two.bad)


def test_files_known_to_be_bad_are_not_opened_again(few_good, monkeypatch):
    opened = []
    original = Dataset.open
    monkeypatch.setattr(Dataset, "open", lambda self, path: opened.append(path) or original(self, path))
    load(dataset(few_good, on_error="replace", max_bad_fraction=1.0), last=20)
    texts = [path for path in opened if "text" in path]
    assert len(texts) > 30
    assert len(texts) == len(set(texts))
    assert len(opened) > len(set(opened))  # other clips of a damaged file may be intact


def test_an_error_of_the_system_is_not_remembered(videos, monkeypatch):
    samples = dataset(videos, on_error="replace", max_bad_fraction=1.0)
    expected = samples[draw(0)]
    with monkeypatch.context() as context:
        context.setattr("tubelet.data.video_dataset.open_video", failing_server)
        with pytest.raises(NoReplacement):
            samples[draw(0)]
    assert torch.equal(samples[draw(0)].clips, expected.clips)


def failing_server(source, decoder):
    raise VideoError("a.mp4", "HTTP status 503") from OSError("503")


def test_in_validation_a_broken_video_is_an_error_or_a_reported_exclusion(videos, broken_video):
    with pytest.raises(VideoError, match="cannot decode frames"):
        dataset(videos, broken_video)[draw(6)]
    batches = list(make_eval_loader(dataset(broken_video, videos, on_error="exclude"), batch_size=1))
    assert [len(batch) for batch in batches] == [0, 1, 1, 1, 1, 1, 1]
    assert [file.path for batch in batches for file in batch.bad] == [broken_video]
    together = next(iter(make_eval_loader(dataset(broken_video, videos, on_error="exclude"), batch_size=4)))
    assert together.indices.tolist() == [1, 2, 3]


def test_short_and_long_videos_can_be_excluded(videos):
    lengths = [20, 27, 34, 41, 48, 55]
    samples = dataset(videos, on_error="exclude", num_frames=10, sampling_rate=4, filter_short_videos=True)
    short = [samples[draw(index)].excluded for index in range(6)]
    assert short == [length < 40 for length in lengths]
    bad = samples[draw(0)].bad
    assert bad == (BadFile(samples.paths[0], "20 frames, fewer than the 40 of a clip (filter_short_videos)", True),)
    everything = dataset(videos, on_error="exclude", filter_long_videos=1)
    assert all(everything[draw(index)].bad[0].filtered for index in range(6))


def test_a_transform_may_return_several_views(videos):
    def two_sizes(clip, rng):
        return {"global": EvalTransform(64, 2)(clip), "local": EvalTransform(32, 3)(clip)}

    sample = dataset(videos, num_clips=2, transform=two_sizes)[draw(0)]
    assert {name: tuple(view.shape) for name, view in sample.views.items()} == {
        "global": (4, 3, 4, 64, 64),
        "local": (6, 3, 4, 32, 32),
    }
    batch = collate([sample, sample], step=0)
    assert torch.equal(batch.views["local"][6:], sample.views["local"])


def test_a_format_may_add_targets(videos):
    class Captioned(Dataset):
        def targets(self, index):
            return {**super().targets(index), "caption": self.paths[index].rsplit("/", 1)[1]}

    data = DataConfig(datasets=[str(videos)], sampling_rate=2, num_frames=4, crop_size=32)
    batch = next(iter(make_eval_loader(Captioned(data, EvalTransform(32)), batch_size=2)))
    assert batch.targets["caption"] == ("a.mp4", "b.mp4")
    assert batch.labels.tolist() == [-1, -1]
