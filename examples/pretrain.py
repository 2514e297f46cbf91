"""V-JEPA in one file, without configuration files: `python examples/pretrain.py`.

It writes generated clips, in which sprites move in one of eight ways behind strong noise, pretrains on them without
labels, and reads the motion from the frozen features with a linear layer, beside those of the random encoder that the
training started from. About three minutes on one core. With your own videos, and lists of `path label` lines:

    python examples/pretrain.py /my/videos --lists train.csv test.csv
"""

import argparse
import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet import hub
from tubelet.data import NORMALIZATION, AugConfig, DataConfig, to_float
from tubelet.data.generated import Settings, write_dataset
from tubelet.data.loader import make_eval_loader, make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import EvalTransform, TrainTransform
from tubelet.data.video_dataset import Dataset
from tubelet.masks import build_collator
from tubelet.models import build_encoder, build_predictor
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.objectives.losses.hidden_features import take_tokens
from tubelet.objectives.losses.vicreg import covariance, invariance, variance_hinge
from tubelet.probing.heads.linear import LinearHead
from tubelet.runtime.progress import progress
from tubelet.runtime.seeds import seed_for
from tubelet.training.objective import ema_update
from tubelet.training.optimizer import adamw, set_hyperparameters
from tubelet.training.schedules import linear, warmup_cosine

SEED = 0
ENCODER = {"name": "vit_tiny", "embed_dim": 96, "depth": 4, "num_heads": 4, "init_std": 0.12}
PREDICTOR = {"depth": 2, "embed_dim": 64, "num_heads": 4, "init_std": 0.12}
MASK = {"name": "multiblock3d", "num_blocks": 2, "spatial_scale": (0.55, 0.55), "aspect_ratio": (0.75, 1.5)}
AUGMENTATION = AugConfig(random_resize_scale=(0.6, 1.0))
MEAN, STD = AUGMENTATION.normalize_mean, AUGMENTATION.normalize_std


def data_config(videos: Path, random_clip_sampling: bool = True) -> DataConfig:
    """Clips of 16 frames in 1.3 s and 32 × 32 pixels, in tokens of 4 frames and 8 × 8 pixels: 4 × 4 × 4 tokens."""
    sizes = {"num_frames": 16, "crop_size": 32, "tubelet_size": 4, "patch_size": 8}
    return DataConfig(datasets=[str(videos)], fps=12, random_clip_sampling=random_clip_sampling, batch_size=32, **sizes)


def pretrain(encoder: Encoder, predictor: Predictor, data: DataConfig, steps: int) -> tuple[Encoder, list[float]]:
    """Train encoder and predictor. Returns the target encoder, and the loss of each step."""
    dataset = Dataset(data, TrainTransform(AUGMENTATION, data.crop_size), seed=SEED, on_error="replace")
    stream = SampleStream(dataset.sizes, None, data.batch_size, SEED)
    masks = build_collator([MASK, MASK], data.clip_shape)  # two masks of each clip
    batches = make_train_loader(dataset, stream, masks, seed=SEED, first_step=0, last_step=steps)

    device = next(encoder.parameters()).device
    target_encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
    optimizer = adamw([encoder, predictor], lr=2e-3, weight_decay=0.05)
    losses = []
    for step, batch in enumerate(bar := progress(batches, desc="pretraining", unit="step")):
        lr = warmup_cosine(step + 1, steps / 12, steps, start=1e-5, peak=2e-3, final=1e-6)
        set_hyperparameters(optimizer, lr=lr, weight_decay=0.05)

        batch = batch.to(device)
        clips = to_float(batch.clips, MEAN, STD)  # [B, 3, T, H, W]
        masks_context, masks_target = list(batch.masks_context), list(batch.masks_target)  # int64 [B, K] for each mask

        with torch.no_grad():  # what is predicted: features of the whole clip, at the hidden positions
            features = target_encoder(clips)  # [B, N, D]
            features = F.layer_norm(features, features.shape[-1:])
            targets = [take_tokens(features, mask) for mask in masks_target]
        contexts = encoder(clips, masks_context)  # the visible tokens alone
        predictions = predictor(contexts, targets, masks_context, masks_target)
        errors = [(prediction - target).abs().mean() for prediction, target in zip(predictions, targets, strict=True)]

        # The prediction error of V-JEPA, and the terms of VICReg, without which little is learned at this scale.
        clip_features = [context.mean(1) for context in contexts]
        spread = torch.stack([variance_hinge(x, floor=0.5) for x in clip_features]).mean()
        redundancy = torch.stack([covariance(x) for x in clip_features]).mean()
        loss = torch.stack(errors).mean() + 2 * spread + 2 * invariance(clip_features) + redundancy

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *predictor.parameters()], 1.0)
        optimizer.step()
        ema_update(target_encoder, encoder, momentum=linear(step, steps, 0.99, 0.999))
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    return target_encoder, losses


@torch.no_grad()
def mean_tokens(encoder: Encoder, videos: Path) -> tuple[Tensor, Tensor]:
    """Return the mean token [n, 1, D] and the class [n] of each video of a list."""
    data = data_config(videos, random_clip_sampling=False)
    device = next(encoder.parameters()).device
    batches = make_eval_loader(Dataset(data, EvalTransform(data.crop_size), on_error="exclude"), batch_size=100)
    found = [
        (encoder(to_float(batch.clips.to(device), MEAN, STD)).mean(1, keepdim=True).cpu(), batch.labels)
        for batch in batches
    ]
    tokens, labels = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(labels)


def linear_probe(encoder: Encoder, train: Path, test: Path) -> float:
    """Return the top-1 accuracy in percent of a linear layer on the mean tokens of the frozen encoder."""
    tokens, labels = mean_tokens(encoder, train)
    head = LinearHead(tokens.shape[-1], int(labels.max()) + 1)
    head.set_statistics(tokens.mean((0, 1)), tokens.std((0, 1)))
    optimizer = adamw([head], lr=0.01, weight_decay=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(head(tokens), labels).backward()
        optimizer.step()
    tokens, labels = mean_tokens(encoder, test)
    return 100 * (head(tokens).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, nargs="?", help="folder, list or index; default: generated clips")
    parser.add_argument("--lists", type=Path, nargs=2, metavar=("TRAIN", "TEST"), help="labeled videos for the probe")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--folder", type=Path, default=Path("runs/example"))
    args = parser.parse_args()
    if args.videos is None:
        write_dataset(args.folder / "clips", Settings(clips=1200, train=400, test=400), processes=1)
        args.videos = args.folder / "clips" / "pretrain"
        args.lists = [args.folder / "clips" / f"motion_{split}.csv" for split in ("train", "test")]

    data = data_config(args.videos)
    torch.manual_seed(seed_for(SEED, "initialisation"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = build_encoder(ENCODER, data.clip_shape).to(device)
    predictor = build_predictor(PREDICTOR, encoder, data.clip_shape, num_mask_tokens=2).to(device)
    random_encoder = copy.deepcopy(encoder)

    target_encoder, losses = pretrain(encoder, predictor, data, args.steps)
    parts = {"target_encoder": target_encoder, "encoder": encoder, "predictor": predictor}
    hub.save(args.folder, parts, step=args.steps, normalization=dict(zip(NORMALIZATION, (MEAN, STD), strict=True)))
    results = {"loss": losses}
    if args.lists:
        encoders = {"pretrained": target_encoder, "random": random_encoder}
        results["top1"] = {name: linear_probe(module, *args.lists) for name, module in encoders.items()}
        print(*(f"linear probe, {name} encoder: {top1:.1f} %" for name, top1 in results["top1"].items()), sep="\n")
    (args.folder / "results.json").write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
