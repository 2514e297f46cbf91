"""No step of any program waits for the GPU, or mixes devices: on fake CUDA tensors, see `fake_cuda`.

Reads that a program does on purpose, at the end of an epoch or of a measurement, are not part of a step.
"""

import contextlib
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
import torch

from app.classification import train as classification
from app.classification.data import Videos
from app.generation import train as generation
from app.main import PROGRAMS as APPS
from app.vjepa import train as pretraining
from app.zoo import measure as zoo
from evals.knn import eval as knn
from evals.main import PROGRAMS as EVALUATIONS
from tests.gpu_guards.fake_cuda import fake_cuda
from tests.processes import run as run_on_processes
from tubelet import objectives
from tubelet.data import Batch
from tubelet.features.store import Items
from tubelet.generation.feature_decoder import DecoderConfig, FeatureDecoder, PixelDecoder, PretrainConfig
from tubelet.layers import block_attention
from tubelet.probing import encoder as frozen
from tubelet.probing import results
from tubelet.probing import run as probing
from tubelet.probing.encoder import with_normalization
from tubelet.probing.fit import Fitter
from tubelet.runtime.distributed import World
from tubelet.runtime.launch import load
from tubelet.runtime.transfer import to_device
from tubelet.runtime.watchdog import Watchdog

CUDA = World(device=torch.device("cuda:0"))
REPOSITORY = Path(__file__).parents[2]
DEMOS = sorted(path.stem for path in REPOSITORY.glob("configs/pretrain/*demo.yaml"))
WITH_SOUND = "../audio/pretrain_demo"
ENCODERS = sorted(path.stem for path in REPOSITORY.glob("configs/zoo/*.yaml") if path.stem != "base")
SMALL = ["encoder.embed_dim=48", "encoder.depth=1", "data.batch_size=4"]
SMALL_PREDICTOR = ["objective.predictor.depth=1", "objective.predictor.embed_dim=24"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with 8 videos of noise, 16 frames of 32 × 32, and the lists of their labels."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for number in range(8):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
            stream.width = stream.height = 32
            for _ in range(16):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
    (folder / "labels.csv").write_text("".join(f"{folder}/{number}.mp4 {number % 2}\n" for number in range(8)))
    return folder


def in_a_process(function, *arguments):
    """Call `function(*arguments)` in a process of its own."""
    run_on_processes(lambda options, world: function(*options), arguments, 1)


@contextlib.contextmanager
def no_waits():
    """`with no_waits() as device:`; what comes before a `device.clear()` may wait."""
    with fake_cuda() as device:
        yield device
    assert device.operations > 0
    assert not device.waits, "\n".join(f"{count} × {what}: {place}" for (what, place), count in device.waits.items())


def train(device, trainer, batches):
    """Take a step for each batch; the first makes what lasts, such as the optimizer's state."""
    for number, batch in enumerate(batches):
        metrics = trainer.train_step(batch)
        trainer._log_step(metrics)
        if number == 0:
            device.clear()


def pretrain(config, videos, folder, *overrides):
    overrides = [f"data.datasets=[{videos}]", f"folder={folder}", *overrides]
    options = load(APPS, f"{REPOSITORY}/configs/pretrain/{config}.yaml", overrides).options
    with no_waits() as device:
        dataset, stream = pretraining.make_stream(options, CUDA)
        trainer = pretraining.make_trainer(options, options.optimization.schedule(stream.steps_per_pass), CUDA)
        train(device, trainer, pretraining.make_batches(options, dataset, stream, CUDA, range(2)))


OVERRIDES = {
    "vjepa2_1_demo": ["encoder.depth=4"],
    "videomae_demo": ["objective.decoder.depth=1"],
    "levjepa_demo": [],
    WITH_SOUND: ["objective.sound_encoder={name: vit_tiny, embed_dim: 48, depth: 1, num_heads: 4}"],
    "salt_demo": [
        "objective.teacher={checkpoint: random, patch_size: 8, tubelet_size: 4, "
        "encoder: {name: vit_tiny, embed_dim: 48, depth: 1, num_heads: 4}}"
    ],
}


@pytest.mark.parametrize("config", [*DEMOS, WITH_SOUND])
def test_pretraining(config, videos, tmp_path):
    decoder = [] if config in ("videomae_demo", "levjepa_demo") else SMALL_PREDICTOR
    in_a_process(pretrain, config, videos, tmp_path, *SMALL, *decoder, *OVERRIDES.get(config, []))


@pytest.mark.parametrize(
    "overrides",
    [
        ["meta.dtype=float16", "optimization.accumulation_steps=2", "optimization.clip_separately=true"],
        ["meta.dtype=bfloat16", "encoder.use_rope=true", "encoder.use_activation_checkpointing=true"],
        ["objective.reg_coeff=1", "objective.predictor={use_mask_tokens: false, noise_schedule: vjepa}"],
    ],
    ids=["float16", "bfloat16", "diffusion"],
)  # fmt: skip
def test_options_of_pretraining(overrides, videos, tmp_path):
    in_a_process(pretrain, "demo", videos, tmp_path, *SMALL, *SMALL_PREDICTOR, *overrides)


@torch.no_grad()
def encode(name):
    """All tokens, and those of two masks that are tubes, as the masks of the recipes."""
    encoder = zoo.build(f"{REPOSITORY}/configs/zoo/{name}.yaml")
    clip = encoder.built_from["clip"]
    tubes = (torch.arange(4)[:, None] * 16 + torch.arange(5)).flatten().repeat(2, 1)

    def flex_attention(q, k, v, **options):  # the original compiles, for a device that is not there
        return torch.empty_like(q)

    with no_waits() as device, mock.patch.object(block_attention, "_flex_attention", flex_attention):
        encoder.to("cuda")
        video = torch.zeros(2, 3, clip["num_frames"], 32, 32, device="cuda")
        keep = to_device(tubes, "cuda")
        encoder(video)  # makes what lasts, such as masks of attention patterns
        device.clear()
        encoder(video)
        if encoder.accepts_masks:
            encoder.tube_masks = True
            encoder(video, [keep, keep])


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    in_a_process(encode, name)


def classify(videos, folder, *overrides):
    overrides = [
        f"data.dataset_train={videos}/labels.csv",
        f"data.dataset_val={videos}/labels.csv",
        "data.num_classes=2",
        "optimization.batch_size=4",
        "optimization.num_epochs=1",
        "optimization.warmup=0",
        "data.patch_size=8",
        "encoder={name: vit_tiny, embed_dim: 48, depth: 1, num_heads: 4}",
        f"folder={folder}",
        *overrides,
    ]
    options = with_normalization(load(APPS, f"{REPOSITORY}/configs/supervised/demo.yaml", overrides).options)
    with no_waits() as device:
        data = Videos(options, CUDA)
        trainer = classification.make_trainer(options, data, CUDA)
        train(device, trainer, data.steps(0))


@pytest.mark.parametrize("mixing", ["", "mixup", "cutmix"])
def test_classification(mixing, videos, tmp_path):
    in_a_process(classify, videos, tmp_path, *([f"optimization.{mixing}=1.0"] if mixing else []))


def generate(videos, folder, model=None):
    overrides = [
        "data.format=video_dataset",
        f"data.train=[{videos}]",
        f"data.test=[{videos}]",
        "data.num_frames=8",
        "data.num_target_frames=8",
        "data.crop_size=32",
        "data.tubelet_size=4",
        "data.channels=3",
        "encoder={name: generative_timesformer_tiny, embed_dim: 48, depth: 1, num_heads: 4}",
        f"folder={folder}",
    ]
    options = load(APPS, f"{REPOSITORY}/configs/generation/moving_mnist.yaml", overrides).options
    with no_waits() as device, contextlib.ExitStack() as stack:
        if model is not None:
            stack.enter_context(mock.patch.object(generation, "build_model", return_value=model))
        trainer = generation.make_trainer(options, CUDA)
        zero = torch.zeros(4, dtype=torch.int64)
        clips = torch.zeros(4, 3, 16, 32, 32, dtype=torch.uint8)
        batches = [Batch({"clip": clips}, {}, zero, ("",) * 4, zero[:, None], step).pin_memory() for step in range(2)]
        train(device, trainer, batches)
        device.clear()
        trainer.objective.model(torch.zeros(2, 3, 8, 32, 32, device="cuda"), draw=1)


def feature_decoder(videos, *overrides):
    overrides = [f"data.datasets=[{videos}]", *SMALL, *SMALL_PREDICTOR, *overrides]
    options = load(APPS, f"{REPOSITORY}/configs/pretrain/demo.yaml", overrides).options
    parts = objectives.build(options.objective, options.setup(schedule_steps=1)).parts()
    grid = options.data.clip_shape.grid
    decoder = PixelDecoder(DecoderConfig(embed_dim=24, depth=1), 48, grid._replace(t=2), 3, 8, 4)
    mean, std = options.data_aug.normalize_mean, options.data_aug.normalize_std
    pretrain = PretrainConfig(folder="", sampling_steps=2)
    return FeatureDecoder(parts, decoder, pretrain, grid=grid, context_length=2, mean=mean, std=std)


def test_frame_prediction(videos, tmp_path):
    in_a_process(generate, videos, tmp_path)


@pytest.mark.parametrize("mask_tokens", ["true", "false"])
def test_frame_prediction_from_features(mask_tokens, videos, tmp_path):
    model = feature_decoder(videos, f"objective.predictor.use_mask_tokens={mask_tokens}")
    in_a_process(generate, videos, tmp_path, model)


def probe(videos, folder, stored, *overrides):
    """Fit heads for an epoch of three batches. The losses are read at the end of the epoch, after the last batch."""
    overrides = [
        f"data.dataset_train={videos}/labels.csv",
        f"data.dataset_val={videos}/labels.csv",
        "data.num_classes=2",
        "data.cache=null",
        "optimization={resolution: 32, num_epochs: 1, batch_size: 3, heads: {lr: [1e-3], weight_decay: [0.1]}}",
        "pretrain={checkpoint: random, patch_size: 8, tubelet_size: 4, "
        "encoder: {name: vit_tiny, embed_dim: 48, depth: 1, num_heads: 4}}",
        f"folder={folder}",
        *overrides,
    ]
    options = load(EVALUATIONS, f"{REPOSITORY}/configs/evals/demo.yaml", overrides).options
    options = with_normalization(options)
    o = options.optimization
    with no_waits() as device, mock.patch.object(frozen, "fingerprint", return_value=""):
        encoder = frozen.load_frozen(options.pretrain, options.data, o.resolution, CUDA, bfloat16=True)
        sets = probing._labelled(options, CUDA)
        fitted = probing.Probe(options, encoder, sets, Watchdog(CUDA, 60.0))
        if stored:
            fitted.train._stored = torch.zeros(8, 1, 1, *((64, 48) if stored == "tokens" else (1, 48))).bfloat16()
            fitted.train._rows = torch.arange(8)
        fitter = Fitter(o, fitted.train, fitted._make_head, 0, folder, 3, "", save_every_minutes=1e9)
        batches, waits = fitted.train.batches, []

        def recorded(*arguments):
            for batch in batches(*arguments):
                waits.append(dict(device.waits))
                yield batch

        with mock.patch.object(fitted.train, "batches", recorded), mock.patch.object(Fitter, "_save"):
            device.clear()
            fitter.fit("all", [{"lr": lr, "weight_decay": 0.1} for lr in (1e-3, 2e-3)], torch.arange(8))
        assert len(waits) == 3
        device.waits = waits[-1]


@pytest.mark.parametrize(
    ("head", "stored"), [("attentive", None), ("attentive", "tokens"), ("linear", None), ("linear", "mean")]
)
def test_probe(head, stored, videos, tmp_path):
    in_a_process(probe, videos, tmp_path, stored, f"head={head}")


def monitor(videos, folder):
    overrides = [f"data.datasets=[{videos}]", f"folder={folder}", *SMALL, *SMALL_PREDICTOR, "meta.dtype=bfloat16"]
    options = load(APPS, f"{REPOSITORY}/configs/pretrain/demo.yaml", overrides).options
    encoder = options.setup(schedule_steps=1).build_encoder(drop_tokens=True)
    with no_waits() as device:
        watched = pretraining.feature_monitor(options, CUDA)
        watched._read(lambda note: None)
        encoder.to("cuda")
        device.clear()
        moments = watched._encode(encoder, watched._clips, lambda note: None)
        assert moments.clips.device.type == moments.positions.device.type == "cuda"


def test_feature_monitor(videos, tmp_path):
    in_a_process(monitor, videos, tmp_path)


def classify_by_neighbors(with_test):
    """Reads come before the votes, and where they are counted."""
    vectors, labels, times = torch.zeros(1100, 6), torch.zeros(1100, dtype=torch.int64), np.zeros(1100)
    items = Items(vectors, labels, [""] * 1100, times, times, torch.arange(1100))
    options = knn.Options(eval_name="knn", folder="", features="", num_classes=2, k=[1, 5], temperature=[0.07, None])
    with no_waits() as device:

        def consume(batches, *arguments):
            device.clear()
            assert len(list(batches)) == 2

        with mock.patch.object(results, "validate", consume):
            knn._classify(options, items, items if with_test else None, options_grid(options), CUDA)


def options_grid(options):
    return [{"k": k, "temperature": temperature} for k in options.k for temperature in options.temperature]


def test_nearest_neighbors():
    in_a_process(classify_by_neighbors, True)
