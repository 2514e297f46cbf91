"""Captioning, question answering and retrieval: `python -m app.main --fname configs/language/<name>.yaml`."""

import itertools
from pathlib import Path

from app.language.data import read_lists
from app.language.evaluation import evaluate
from app.language.model import build_model, build_text_encoder
from app.language.options import Options
from app.language.retrieval import zero_shot_records
from app.language.videos import Run, read_features, training_videos
from tubelet.data.streams import SampleStream
from tubelet.probing.encoder import with_normalization
from tubelet.probing.fine_tuning import fit, make_trainer
from tubelet.runtime.distributed import World
from tubelet.runtime.run_folder import check_same_configuration
from tubelet.runtime.watchdog import Watchdog
from tubelet.training.schedules import Schedule


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
    described = itertools.chain(lists.train, lists.val, *lists.further.values(), labelled)
    features = read_features(options, model, list(described), world)

    videos = training_videos(options, lists.train_samples(), text, features)
    global_batch = options.optimization.batch_size * world.world_size
    stream = SampleStream(videos.sizes, None, global_batch, options.meta.seed)
    o, steps = options.optimization, stream.steps_per_pass
    schedule, trained = Schedule(o, o.num_epochs * steps, steps), None if model.frozen else model.encoder
    trainer = make_trainer(model, options, schedule, global_batch, world, encoder=trained, data_state=lists)
    data, workers = options.data, options.data.num_workers if features.tokens is None else 0
    fit(trainer, data, videos, stream, workers, data.max_bad_fraction)
    if world.is_main and options.language_model.folder is None:
        text.tokenizer.save_pretrained(str(folder / "tokenizer"))
    with Watchdog(world, options.distributed.timeout) as watchdog:
        evaluate(model, lists, len(videos), Run(options, text, features, world, watchdog))
