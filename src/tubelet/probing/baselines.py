"""Non-learned baselines: what one frame, differences of frames, or the file's size and length tell about the label.

An encoder whose features are not better than these has shown nothing.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.config import UserError
from tubelet.data import Decoder
from tubelet.data.decoders import open_video, read_frames
from tubelet.probing.split import stratified_parts

FRAME_CELLS = 16
DIFFERENCE_CELLS = 8
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 3


def describe(path: str, num_frames: int, average: bool, decoder: Decoder) -> dict[str, np.ndarray]:
    """Compute the inputs of the baselines for a video.

    Args:
        path: The file.
        num_frames: Frames, evenly spaced over the video, between which differences are taken.
        average: Average the differences over time.
        decoder: As in `data.decoder`.

    Returns:
        1-D arrays. `frame`: colors of the middle frame in 16 × 16 cells. `difference`: absolute differences of the
        gray values of consecutive frames in 8 × 8 cells, of each pair or their mean. `metadata`: width, height, their
        ratio, number of frames, seconds.

    Raises:
        VideoError: The file cannot be read.
    """
    video = open_video(path, decoder)
    positions = np.linspace(0, video.num_frames - 1, num_frames).round().astype(np.int64)
    middle = np.array([video.num_frames // 2])
    needed = np.union1d(positions, middle)
    decoded = read_frames(video, needed, path)
    frames = decoded[np.searchsorted(needed, positions)]
    frame = decoded[np.searchsorted(needed, middle)[0]]
    differences = np.abs(np.diff(frames.astype(np.float32).mean(-1), axis=0))
    cells = _average_cells(differences[:, None], DIFFERENCE_CELLS)
    height, width = frame.shape[:2]
    metadata = (width, height, width / height, video.num_frames, video.num_frames / video.fps)
    return {
        "frame": _average_cells(frame.transpose(2, 0, 1)[None], FRAME_CELLS).reshape(-1),
        "difference": (cells.mean(0) if average else cells).reshape(-1),
        "metadata": np.array(metadata, dtype=np.float32),
    }


def accuracy(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, num_classes: int) -> float:
    """Accuracy in percent of a logistic regression.

    Args:
        train: [m, D] features to fit to, with labels [m]. Cross-validation on them selects the penalty.
        val: [n, D] features to evaluate on, with labels [n].
    """
    parts = torch.tensor(stratified_parts(train_labels.tolist(), FOLDS, seed=0))
    correct = dict.fromkeys(PENALTIES, 0)
    for penalty, fold in itertools.product(PENALTIES, range(FOLDS)):
        held_out = parts == fold
        if not held_out.any() or held_out.all():
            continue
        predict = logistic_regression(train[~held_out], train_labels[~held_out], num_classes, penalty)
        correct[penalty] += int((predict(train[held_out]) == train_labels[held_out]).sum())
    best = max(PENALTIES, key=lambda penalty: (correct[penalty], penalty))
    predict = logistic_regression(train, train_labels, num_classes, best)
    return 100 * float((predict(val) == val_labels).float().mean())


def logistic_regression(
    features: Tensor, labels: Tensor, num_classes: int, penalty: float
) -> Callable[[Tensor], Tensor]:
    """Fit a logistic regression; returns a function from features [n, D] to classes [n].

    Minimizes mean cross-entropy + penalty / 2 · |W|² of the standardized features by L-BFGS, in float64. Raises
    UserError where it diverges.
    """
    features = features.double()
    mean, std = features.mean(0), features.std(0, correction=min(1, len(features) - 1)).clamp_min(1e-6)
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
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise UserError("baselines: a logistic regression has diverged; leave its input out of `kinds`")
    return lambda features: (((features.double() - mean) / std) @ weight + bias).argmax(1)


def stack(described: Sequence[dict[str, np.ndarray]], kind: str) -> Tensor:
    """[n, D]: the inputs of one baseline for n videos, as from `describe`."""
    return torch.from_numpy(np.stack([arrays[kind] for arrays in described]))


def _average_cells(frames: np.ndarray, cells: int) -> np.ndarray:
    """[n, C, cells, cells]: means over the cells of a regular grid, of frames [n, C, H, W]."""
    return F.adaptive_avg_pool2d(torch.from_numpy(frames.astype(np.float32)), cells).numpy()
