import math

import numpy as np
import pytest
import torch

from tubelet.generation.forecasts import BASELINES, roll_out
from tubelet.generation.metrics import FrameMetrics


def frames(clips=2, channels=1, length=4, height=16, width=14, seed=0):
    return torch.rand(clips, channels, length, height, width, generator=torch.Generator().manual_seed(seed))


def forecast(seen):
    """Two frames that depend on all input frames and exceed the range [0, 1]."""
    return 1.7 * torch.stack([seen.mean(2).flip(-1), seen[:, :, 0] - seen[:, :, -1] * 0.3], dim=2)


@pytest.mark.parametrize("ahead", [1, 2, 5, 8])
def test_rollout_applies_the_forecast_repeatedly(ahead):
    seen = frames()
    window, expected = list(seen.unbind(2)), []
    while len(expected) < ahead:
        for frame in forecast(torch.stack(window[-4:], dim=2)).unbind(2):
            expected.append(frame.clamp(0, 1))
            window.append(frame.clamp(0, 1))
    assert torch.equal(roll_out(forecast, seen, ahead), torch.stack(expected[:ahead], dim=2))


def test_baselines_equal_loops_over_pixels():
    seen = frames(height=3, width=3)
    predicted = {name: baseline(seen, 6) for name, baseline in BASELINES.items()}
    for b in range(2):
        for y in range(3):
            for x in range(3):
                pixel = seen[b, 0, :, y, x].tolist()
                for k in range(6):
                    expected = {
                        "copy_last": pixel[-1],
                        "linear_extrapolation": min(1, max(0, pixel[-1] + (k + 1) * (pixel[-1] - pixel[-2]))),
                        "mean_of_seen": sum(pixel) / 4,
                    }
                    for name, value in expected.items():
                        assert float(predicted[name][b, 0, k, y, x]) == pytest.approx(value, abs=1e-6), name


def ssim_loop(a, b):
    """Wang et al. 2004, with a loop over the windows around each pixel of images [H, W], with reflection padding."""
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    weights = torch.tensor(weights, dtype=torch.float64)
    weights /= weights.sum()
    height, width = a.shape
    a, b = (torch.from_numpy(np.pad(image.numpy(), 5, mode="reflect")) for image in (a, b))
    values = []
    for y in range(height):
        for x in range(width):
            p, q = a[y : y + 11, x : x + 11].double(), b[y : y + 11, x : x + 11].double()
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
            covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
            structure = (2 * covariance + 0.03**2) / (var_p + var_q + 0.03**2)
            values.append(float((2 * mean_p * mean_q + 0.01**2) / (mean_p**2 + mean_q**2 + 0.01**2) * structure))
    return sum(values) / len(values)


@pytest.mark.parametrize("channels", [1, 3])
def test_metrics_equal_a_loop_over_frames(channels):
    true = frames(clips=3, channels=channels, length=2)
    predicted = (true + 0.2 * (frames(clips=3, channels=channels, length=2, seed=1) - 0.5)).clamp(0, 1)
    metrics = FrameMetrics(num_frames=2)
    for part in (slice(0, 1), slice(1, 3)):  # batches of different sizes
        metrics.update(predicted[part], true[part])
    measured = metrics.compute()
    for t in range(2):
        clip_metrics = []
        for b in range(3):
            error = (predicted[b, :, t].double() - true[b, :, t].double()) ** 2
            ssim = sum(ssim_loop(predicted[b, c, t], true[b, c, t]) for c in range(channels)) / channels
            clip_metrics.append((float(error.sum()), float(error.mean()), -10 * math.log10(float(error.mean())), ssim))
        for name, values in zip(("mse_sum", "mse", "psnr", "ssim"), zip(*clip_metrics, strict=True), strict=True):
            assert measured["per_frame"][name][t] == pytest.approx(sum(values) / 3, rel=1e-4, abs=2e-6), name
    for name in ("mse_sum", "mse", "psnr", "ssim"):
        assert measured[name] == pytest.approx(sum(measured["per_frame"][name]) / 2, abs=1e-5)


def test_metrics_are_reduced_over_processes():
    true, predicted = frames(clips=4), frames(clips=4, seed=1)
    alone = FrameMetrics(num_frames=4)
    alone.update(predicted, true)
    first, second = FrameMetrics(num_frames=4), FrameMetrics(num_frames=4)
    first.update(predicted[:1], true[:1])
    second.update(predicted[1:], true[1:])
    others = iter([torch.tensor([second.clips]), second.sums])
    first.gather(lambda tensor: tensor + next(others), torch.device("cpu"))
    assert first.clips == 4
    together, expected = first.compute(), alone.compute()
    for name in ("mse_sum", "mse", "psnr", "ssim"):
        assert together["per_frame"][name] == pytest.approx(expected["per_frame"][name], abs=1e-5)


def test_psnr_of_a_perfect_prediction_is_finite():
    metrics = FrameMetrics(num_frames=4)
    metrics.update(frames(), frames())
    assert {name: value for name, value in metrics.compute().items() if name != "per_frame"} == {
        "mse_sum": 0, "mse": 0, "psnr": 100, "ssim": pytest.approx(1),
    }  # fmt: skip
