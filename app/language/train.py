"""Captioning, question answering and retrieval: `python -m app.main --fname configs/language/<name>.yaml`."""

from pathlib import Path

from app.language.data import Lists, read_lists
from app.language.evaluation import evaluate
from app.language.model import Model, build_model, build_text_encoder
from app.language.options import Options
from app.language.retrieval import zero_shot_records
from app.language.videos import Run, read_features, training_videos
from tubelet.config import ConfigError
from tubelet.data.bad_files import BadFiles
from tubelet.data.loader import make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.probing.encoder import with_normalization
from tubelet.runtime.distributed import World
from tubelet.runtime.run_folder import check_same_configuration
from tubelet.runtime.watchdog import Watchdog
from tubelet.training.callbacks import BadFileCheck
from tubelet.training.schedules import Schedule
from tubelet.training.trainer import Trainer


def main(options: Options, world: World) -> None:
    """Train to the last epoch, or continue the run in the folder; then write texts and measure them."""
    options = world.broadcast_from_rank0(lambda: with_normalization(options))
    folder = Path(options.folder)
    world.broadcast_from_rank0(lambda: check_same_configuration(folder, options))
    lists = read_lists(options)
    text = build_text_encoder(options, lists.texts(), world)
    model = build_model(options, text, lists.answers).to(world.device)
    zero_shot = options.evaluation.zero_shot
    labelled = zero_shot_records(zero_shot) if zero_shot else []
    features = read_features(options, model, [*lists.train, *lists.val, *labelled], world)

    videos = training_videos(options, lists.train_samples(), text, features)
    global_batch = options.optimization.batch_size * world.world_size
    stream = SampleStream(videos.sizes, None, global_batch, options.meta.seed)
    trainer = make_trainer(options, model, stream, lists, world)
    trainer.resume()
    batches = make_train_loader(
        videos,
        stream,
        masks=None,
        seed=options.meta.seed,
        first_step=trainer.step,
        last_step=trainer.last_step,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=options.data.num_workers if features.tokens is None else 0,
        pin_memory=world.device.type == "cuda",
        timeout=options.data.worker_timeout,
    )
    bad_files = BadFiles(folder / "bad_files.txt", options.data.max_bad_fraction, world)
    trainer.fit(batches, [BadFileCheck(bad_files)])
    if world.is_main and options.language_model.folder is None:
        text.tokenizer.save_pretrained(str(folder / "tokenizer"))
    with Watchdog(world, options.distributed.timeout) as watchdog:
        evaluate(model, lists, len(videos), Run(options, text, features, world, watchdog))


def make_trainer(options: Options, model: Model, stream: SampleStream, lists: Lists, world: World) -> Trainer:
    """Return the trainer of the model. Raises ConfigError where the encoder has no layers for `layer_decay`."""
    o = options.optimization
    # What hub needs to build an encoder that is trained, and the normalization of its clips.
    config = {**({} if model.frozen else model.encoder.built_from), "data_aug": options.data.normalization()}
    try:
        return Trainer(
            model,
            options,
            Schedule(o, o.num_epochs * stream.steps_per_pass, stream.steps_per_pass),
            world,
            global_batch=o.batch_size * world.world_size,
            batch_size_key="optimization.batch_size",
            config=config,
            data_state=lists,
        )
    except ValueError as error:
        raise ConfigError(f"optimization.layer_decay: {error}") from None
