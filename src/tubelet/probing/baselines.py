"""Floors: what can be told of a label without a network, from one frame, from differences of frames, or from the file.

An encoder that is not above them has shown nothing.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.data.decoders import open_video, read_frames
from tubelet.probing.split import stratified_parts

FRAME_CELLS = 16
DIFFERENCE_CELLS = 8
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 3


def describe(path: str, num_frames: int, average: bool, decoder: str) -> dict[str, np.ndarray]:
    """What the floors see of a video, 1-D vectors.

    `frame`: colours of the middle frame in 16 × 16 cells. `difference`: absolute grey differences between consecutive
    ones of `num_frames` frames, evenly over the video, in 8 × 8 cells; their mean over time if `average`, else each.
    `metadata`: width, height, their ratio, number of frames, seconds. Raises VideoError when the file cannot be read.
    """
    video = open_video(path, decoder)
    places = np.linspace(0, video.num_frames - 1, num_frames).round().astype(np.int64)
    middle = np.array([video.num_frames // 2])
    read = read_frames(video, np.union1d(places, middle), path)
    frames = read[np.searchsorted(np.union1d(places, middle), places)]
    frame = read[np.searchsorted(np.union1d(places, middle), middle)[0]]
    differences = np.abs(np.diff(frames.astype(np.float32).mean(-1), axis=0))
    cells = _cells(differences[:, None], DIFFERENCE_CELLS)
    height, width = frame.shape[:2]
    numbers = (width, height, width / height, video.num_frames, video.num_frames / video.fps)
    return {
        "frame": _cells(frame.transpose(2, 0, 1)[None], FRAME_CELLS).reshape(-1),
        "difference": (cells.mean(0) if average else cells).reshape(-1),
        "metadata": np.array(numbers, dtype=np.float32),
    }


def accuracy(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, num_classes: int) -> float:
    """Percent right on `val` [n, D] of a logistic regression on `train` [m, D]; cross-validation sets its penalty."""
    parts = torch.tensor(stratified_parts(train_labels.tolist(), FOLDS, seed=0))
    right = dict.fromkeys(PENALTIES, 0)
    for penalty, fold in itertools.product(PENALTIES, range(FOLDS)):
        inside = parts == fold
        if not inside.any() or inside.all():
            continue
        predict = logistic_regression(train[~inside], train_labels[~inside], num_classes, penalty)
        right[penalty] += int((predict(train[inside]) == train_labels[inside]).sum())
    best = max(PENALTIES, key=lambda penalty: (right[penalty], penalty))
    predict = logistic_regression(train, train_labels, num_classes, best)
    return 100 * float((predict(val) == val_labels).float().mean())


def logistic_regression(features: Tensor, labels: Tensor, num_classes: int, penalty: float):
    """A function from features [n, D] to classes [n].

    Minimises mean cross-entropy + penalty / 2 · |W|² of the standardised features by L-BFGS, in float64.
    """
    features = features.double()
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / std
    weight = torch.zeros(x.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach(), bias.detach()
    return lambda features: (((features.double() - mean) / std) @ weight + bias).argmax(1)


def stacked(described: Sequence[dict[str, np.ndarray]], floor: str) -> Tensor:
    """[n, D] of one floor's vectors."""
    return torch.from_numpy(np.stack([each[floor] for each in described]))


def _cells(frames: np.ndarray, cells: int) -> np.ndarray:
    """Means [n, C, cells, cells] over the cells of a grid laid on frames [n, C, H, W]."""
    return F.adaptive_avg_pool2d(torch.from_numpy(frames.astype(np.float32)), cells).numpy()
