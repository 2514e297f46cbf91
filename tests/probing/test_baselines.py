import av
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tubelet.config import UserError
from tubelet.probing import baselines


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Ten frames of 32 × 48: the left half is dark, then jumps to bright after frame 4; the right half stays green."""
    path = tmp_path_factory.mktemp("videos") / "jump.mp4"
    frames = np.zeros((10, 32, 48, 3), np.uint8)
    frames[:, :, 24:, 1] = 200
    frames[5:, :, :24] = 150
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def test_frame_is_the_middle_one_in_cells(video):
    frame = baselines.describe(video, 4, True, "decord")["frame"].reshape(3, 16, 16)
    np.testing.assert_allclose(frame[:, :, :7], 150, atol=6)
    np.testing.assert_allclose(frame[1, :, 9:], 200, atol=6)
    np.testing.assert_allclose(frame[0, :, 9:], 0, atol=6)


def test_differences_are_where_and_when_something_changes(video):
    each = baselines.describe(video, 10, False, "decord")["difference"].reshape(9, 8, 8)
    expected = np.zeros((9, 8, 8))
    expected[4, :, :4] = 150
    np.testing.assert_allclose(each, expected, atol=4)
    mean = baselines.describe(video, 10, True, "decord")["difference"].reshape(8, 8)
    np.testing.assert_allclose(mean, each.mean(0), rtol=1e-5)


def test_metadata_are_size_and_length(video):
    assert baselines.describe(video, 2, True, "decord")["metadata"].tolist() == [48, 32, 1.5, 10, 2]


def test_logistic_regression_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    features = rng.normal(size=(120, 5)) * [1, 10, 100, 1, 1] + labels[:, None] * [1, 0, 50, 0, 0]
    standard = (features - features.mean(0)) / features.std(0, ddof=1)
    penalty = 0.05
    theirs = LogisticRegression(C=1 / (penalty * 120), tol=1e-10, max_iter=10_000).fit(standard, labels)
    ours = baselines.logistic_regression(torch.from_numpy(features), torch.from_numpy(labels), 3, penalty)
    np.testing.assert_array_equal(ours(torch.from_numpy(features)).numpy(), theirs.predict(standard))


def test_a_single_sample_of_which_there_is_no_deviation_gives_its_class():
    predict = baselines.logistic_regression(torch.tensor([[1.0, 2.0]]), torch.tensor([2]), 3, 1.0)
    assert predict(torch.tensor([[5.0, -3.0]])).tolist() == [2]


def test_weights_that_are_not_finite_are_an_error_and_not_an_accuracy():
    features = torch.tensor([[1.0], [float("nan")]])
    with pytest.raises(UserError, match="has diverged"):
        baselines.logistic_regression(features, torch.tensor([0, 1]), 2, 1.0)


def test_accuracy_is_high_where_the_label_shows_and_chance_where_it_does_not():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    noise = torch.randn(400, 20, generator=generator)
    shown = noise + 4 * torch.nn.functional.one_hot(labels, 20)
    half = slice(0, 200), slice(200, 400)
    assert baselines.accuracy(shown[half[0]], labels[half[0]], shown[half[1]], labels[half[1]], 4) > 90
    assert 12 < baselines.accuracy(noise[half[0]], labels[half[0]], noise[half[1]], labels[half[1]], 4) < 40
