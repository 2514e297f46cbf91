"""Are painted digits recognisable? A small classifier of digits reads frames at the true positions of the digits."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.data.moving_mnist import annotated_digits
from tubelet.runtime.seeds import Purpose, numpy_generator, seed_for

CLASSES = 10
APART = 0.25
"""Largest fraction of a digit's box that the other's box covers for the digit to count as apart."""
TRAINING, TEST = 0, 1


class DigitClassifier(nn.Sequential):
    """Crops [N, 1, h, w] with values from 0 to 1, h and w multiples of 4 -> logits [N, 10]."""

    def __init__(self, height: int, width: int):
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 48, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(48 * (height // 4) * (width // 4), 96),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(96, CLASSES),
        )


class DigitClips:
    """Moving MNIST clips with what is where. A clip is a pure function of the seed, its part and its number.

    Args:
        digits: Images uint8 [N, h, w].
        labels: Classes uint8 [N].
        seed: Seed of the clips.
        part: `TRAINING` or `TEST`.
    """

    def __init__(self, digits: np.ndarray, labels: np.ndarray, seed: int, part: int):
        self.digits, self.labels, self.seed, self.part = digits, labels, seed, part

    def __call__(self, first: int, count: int, num_frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return clips number `first` and on: frames [B, 1, T, 64, 64] from 0 to 1, classes [B, 2], and the upper left
        corners of the digits [B, 2, T, 2]."""
        frames, classes, corners = [], [], []
        for index in range(first, first + count):
            rng = numpy_generator(self.seed, Purpose.DIGIT_CLIP, self.part, index)
            clip, numbers, paths = annotated_digits(self.digits, num_frames, rng)
            frames.append(clip)
            classes.append(self.labels[numbers])
            corners.append(paths)
        video = torch.from_numpy(np.stack(frames)).float().unsqueeze(1) / 255
        return video, torch.from_numpy(np.stack(classes)).long(), torch.from_numpy(np.stack(corners))

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.digits.shape[1:]
        return height, width


def crops(frames: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut out the boxes of the digits.

    Args:
        frames: [B, 1, T, H, W].
        corners: Upper left corners (y, x) [B, 2, T, 2].
        size: Height h and width w of a box.

    Returns:
        Crops [B, 2, T, h, w].
    """
    B, _, T = frames.shape[:3]
    corners = corners.to(frames.device)
    rows = corners[..., 0, None] + torch.arange(size[0], device=frames.device)  # [B, 2, T, h]
    columns = corners[..., 1, None] + torch.arange(size[1], device=frames.device)
    clip = torch.arange(B, device=frames.device)[:, None, None, None, None]
    time = torch.arange(T, device=frames.device)[:, None, None]
    return frames[clip, 0, time, rows[..., :, None], columns[..., None, :]]


def overlap(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the fraction of a digit's box that the other digit's box covers [B, T], from corners [B, 2, T, 2]."""
    distance = (corners[:, 0] - corners[:, 1]).abs()
    common = (torch.tensor(size, device=corners.device) - distance).clamp_min(0)
    return common.prod(-1) / (size[0] * size[1])


def train_classifier(clips: DigitClips, steps: int, batch_size: int = 64, lr: float = 3e-3) -> DigitClassifier:
    """Train a classifier of digits on single frames of clips, in which the other digit may cover the one to name.

    Args:
        clips: Clips of training digits.
        steps: Number of steps.
        batch_size: Frames per step, with two digits each.
        lr: Highest learning rate of a one-cycle schedule.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(clips.seed, "digit classifier"))
        model = DigitClassifier(*clips.size).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        for step in range(steps):
            frames, classes, corners = clips(step * batch_size, batch_size, num_frames=1)
            boxes = crops(frames, corners, clips.size).flatten(0, 2).unsqueeze(1)
            loss = F.cross_entropy(model(boxes), classes.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def single_digit_accuracy(classifier: nn.Module, digits: np.ndarray, labels: np.ndarray) -> float:
    """Return the accuracy on images uint8 [N, h, w] of single digits."""
    right = 0
    for first in range(0, len(digits), 500):
        part = torch.from_numpy(digits[first : first + 500].copy()).float().unsqueeze(1) / 255
        right += int((classifier(part).argmax(1).numpy() == labels[first : first + 500]).sum())
    return right / len(digits)


class Recognition:
    """Accuracy of a classifier at the true positions of the digits, for each frame of clips.

    Args:
        classifier: The classifier.
        size: Height and width of a digit's box.
        num_frames: Frames T of the clips.
    """

    def __init__(self, classifier: nn.Module, size: tuple[int, int], num_frames: int):
        self.classifier, self.size = classifier, size
        self.right = torch.zeros(2, num_frames, dtype=torch.int64)
        self.total = torch.zeros(2, num_frames, dtype=torch.int64)

    @torch.no_grad()
    def update(self, frames: Tensor, classes: Tensor, corners: Tensor) -> None:
        """Add clips; arguments as `DigitClips` returns them."""
        boxes = crops(frames.float(), corners, self.size)  # [B, 2, T, h, w]
        named = self.classifier(boxes.flatten(0, 2).unsqueeze(1)).argmax(1).view(boxes.shape[:3])
        right = (named == classes[:, :, None].to(named.device)).cpu()
        apart = (overlap(corners, self.size) <= APART)[:, None].expand_as(right).cpu()
        self.right += torch.stack([right.sum((0, 1)), (right & apart).sum((0, 1))])
        self.total += torch.stack([torch.full_like(self.total[0], right.shape[0] * right.shape[1]), apart.sum((0, 1))])

    def gather(self, sum_over_processes: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Add the counts of all processes."""
        self.right, self.total = (sum_over_processes(x.to(device)).cpu() for x in (self.right, self.total))

    def compute(self) -> dict[str, list[float]]:
        """Return the accuracy of each frame for `all` digits and for those `apart` from the other one."""
        accuracy = (self.right / self.total.clamp_min(1)).tolist()
        return {name: [round(x, 4) for x in values] for name, values in zip(("all", "apart"), accuracy, strict=True)}
