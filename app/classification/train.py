"""Supervised training from scratch: an encoder and an attentive head. `python -m app.main --fname <yaml>`.

Data, head, loss and results are those of a probe; here the encoder learns too.
"""

import time
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from tubelet.config import Config, ConfigError
from tubelet.datasets import AugConfig, to_float
from tubelet.models import ModelConfig, build_encoder
from tubelet.models.attentive_pooler import AttentiveClassifier
from tubelet.probing import heads, results, split
from tubelet.probing.clips import LabelledClips
from tubelet.probing.options import ClassifierConfig, LabelledDataConfig
from tubelet.progress import progress
from tubelet.seeds import generator, seed_for
from tubelet.training import checkpoint
from tubelet.training.distributed import World
from tubelet.training.optim import adamw, set_hyperparameters
from tubelet.training.run_folder import RunFolder
from tubelet.training.schedules import warmup_cosine

# Keys that may differ when a folder's run is continued: they change nothing that is learned.
FREE = ("folder", "data.num_workers", "data.cache", "meta.save_every_minutes")


class DataConfig(LabelledDataConfig):
    patch_size: int = Field(16, ge=1)
    tubelet_size: int = Field(2, ge=1)


class OptimizationConfig(Config):
    """YAML section `optimization`."""

    attend_across_segments: bool = True
    num_epochs: int = Field(50, ge=1)
    resolution: int = Field(224, ge=1)
    batch_size: int = Field(16, ge=1)
    lr: float = Field(1e-3, gt=0)
    start_lr: float = Field(1e-6, ge=0)
    final_lr: float = Field(1e-6, ge=0)
    warmup: float = Field(5, ge=0)
    """Epochs of linear warm-up."""
    weight_decay: float = Field(0.05, ge=0)
    clip_grad: float = Field(1.0, gt=0)
    use_bfloat16: bool = False


class MetaConfig(Config):
    """YAML section `meta`."""

    seed: int = 0
    """Of the weights, the few-shot subset, the order of batches and the augmentation."""
    save_every_minutes: float = Field(5.0, ge=0)


class Options(Config):
    """A supervised run. The last epoch counts: validation chooses nothing."""

    app: Literal["classification"] = "classification"
    folder: str
    data: DataConfig
    data_aug: AugConfig | None = None
    model: ModelConfig = ModelConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    meta: MetaConfig = MetaConfig()


class Classifier(nn.Module):
    """An encoder and its head: clips [B, n, C, T, H, W] -> logits [B, P, num_classes] of P predictions a video."""

    def __init__(self, options: Options):
        super().__init__()
        o, data = options.optimization, options.data
        self.segments, self.attend_across_segments = data.num_segments, o.attend_across_segments
        sizes = {"patch_size": data.patch_size, "tubelet_size": data.tubelet_size}
        try:
            self.encoder = build_encoder(
                options.model, crop_size=o.resolution, num_frames=data.frames_per_clip, **sizes
            )
        except ValueError as error:
            raise ConfigError(f"model, optimization.resolution or data.frames_per_clip: {error}") from None
        head = AttentiveClassifier(
            embed_dim=self.encoder.embed_dim,
            num_heads=options.classifier.num_heads or self.encoder.num_heads,
            depth=options.classifier.num_probe_blocks,
            num_classes=data.num_classes,
        )
        self.head = heads.Heads([head])

    def forward(self, clips: Tensor) -> Tensor:
        tokens = self.encoder(clips.flatten(0, 1))
        tokens = rearrange(tokens, "(B s v) N D -> B s v N D", B=len(clips), s=self.segments)
        return heads.read_out(self.head, tokens, self.attend_across_segments)[0]


def main(options: Options, world: World) -> None:
    """Train to the last epoch, or continue the folder's run; then validate and write what a probe writes."""
    if world.world_size > 1:
        raise ConfigError("supervised training runs in one process; give one device to --devices")
    if (Path(options.folder) / "results.json").is_file():
        RunFolder(options.folder, options, step=options.optimization.num_epochs, free=FREE).close()
        return
    run = _Run(options, world.device)
    loss, top1 = run.train()
    validated = run.validate()
    folder = Path(options.folder)
    results.write_predictions(folder / "predictions.csv", validated, 0, run.val_clips.paths)
    results.draw_confusion(folder / "confusion.png", validated, 0, options.data.num_classes)
    measured = {"top1": validated.top1[0], "top5": validated.top5[0], "train_loss": loss, "train_top1": top1}
    trained_on = sum(run.clips.paths[i] not in run.excluded for i in run.chosen.tolist())
    counts = {"num_train": trained_on, "num_val": len(validated.labels), "num_classes": options.data.num_classes}
    excluded = [{"path": path, "reason": reason} for path, reason in sorted(run.excluded.items())]
    more = {"seed": options.meta.seed, "excluded": excluded}
    results.write_json(folder / "results.json", {**measured, **counts, **more})


class _Run:
    def __init__(self, options: Options, device: torch.device):
        self.options, self.device, self.seed = options, device, options.meta.seed
        data, side = options.data, options.optimization.resolution
        self.clips = LabelledClips(
            data, "dataset_train", resolution=side, augmentation=options.data_aug, seed=self.seed
        )
        self.val_clips = LabelledClips(data, "dataset_val", resolution=side, views=data.num_views_per_segment)
        self.chosen = torch.tensor(split.few_per_class(self.clips.labels, data.labels_per_class, self.seed))
        self.excluded: dict[str, str] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, "supervised"))
            self.model = Classifier(options).to(device)

    def train(self) -> tuple[float, float]:
        """Mean loss and accuracy (percent) over the last epoch."""
        o = self.options.optimization
        folder = Path(self.options.folder) / "checkpoints"
        optimizer = adamw([self.model], lr=o.lr, weight_decay=o.weight_decay)
        first, loss, top1 = self._resume(folder, optimizer)
        log = RunFolder(self.options.folder, self.options, step=first, free=FREE)
        steps = -(-len(self.chosen) // o.batch_size)
        saved = time.monotonic()
        bar = progress(desc="supervised", total=o.num_epochs * steps, initial=first * steps, unit="step")
        for epoch in range(first, o.num_epochs):
            order = self.chosen[torch.randperm(len(self.chosen), generator=generator(self.seed, "order", epoch))]
            sums = torch.zeros(3, device=self.device)
            for i, (clips, labels, _) in enumerate(self._batches(self.clips, order, epoch)):
                step = epoch * steps + i
                lr = warmup_cosine(step, o.warmup * steps, o.num_epochs * steps, o.start_lr, o.lr, o.final_lr)
                set_hyperparameters(optimizer, lr=lr, weight_decay=o.weight_decay)
                logits = self._forward(clips)[None]
                batch_loss = heads.loss(logits, labels).sum()
                batch_loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), o.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                hits = (heads.probabilities(logits.detach())[0].argmax(-1) == labels).sum()
                sums += torch.stack([batch_loss.detach() * len(labels), hits, hits.new_tensor(len(labels))])
                bar.update()
            loss, top1 = float(sums[0] / sums[2]), 100 * float(sums[1] / sums[2])
            log.log([{"step": epoch + 1, "loss": loss, "train_top1": top1, "lr": lr}])
            if epoch + 1 == o.num_epochs or time.monotonic() - saved > 60 * self.options.meta.save_every_minutes:
                state = {"step": epoch + 1, "optimizer": optimizer.state_dict(), "loss": loss, "top1": top1}
                state |= {
                    "encoder": self.model.encoder.state_dict(),
                    "classifier": self.model.head.heads[0].state_dict(),
                }
                checkpoint.save(folder, epoch + 1, state, keep=1)
                saved = time.monotonic()
        bar.close()
        log.close()
        return loss, top1

    @torch.no_grad()
    def validate(self) -> results.Validated:
        self.model.eval()
        predictions = (
            (heads.probabilities(self._forward(clips)[None]), labels, indices)
            for clips, labels, indices in self._batches(self.val_clips, torch.arange(len(self.val_clips)), 0)
        )
        return results.validate(predictions, self.options.data.num_classes, World())

    def _batches(self, clips: LabelledClips, order: Tensor, epoch: int):
        """Normalised clips [B, n, C, T, H, W], labels and sample numbers [B]."""
        data = self.options.data
        for batch in clips.batches(order.split(self.options.optimization.batch_size), epoch):
            self.excluded |= {bad.path: bad.reason for bad in batch.bad}
            if len(batch):
                x = to_float(batch.clips.to(self.device), data.normalize_mean, data.normalize_std)
                yield rearrange(x, "(B n) ... -> B n ...", B=len(batch)), batch.labels.to(self.device), batch.indices

    def _forward(self, clips: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.optimization.use_bfloat16):
            return self.model(clips)

    def _resume(self, folder: Path, optimizer: torch.optim.Optimizer) -> tuple[int, float, float]:
        state = checkpoint.load_latest(folder)
        if state is None:
            return 0, 0.0, 0.0
        checkpoint.load_state(self.model.encoder, state["encoder"], str(folder))
        checkpoint.load_state(self.model.head.heads[0], state["classifier"], str(folder))
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["loss"], state["top1"]
