"""Captioning, question answering and retrieval: `python -m app.main --fname configs/language/<name>.yaml`."""

import itertools

from app.language.data import read_lists
from app.language.evaluation import evaluate
from app.language.model import build_model, build_text_encoder
from app.language.options import Options
from app.language.retrieval import zero_shot_records
from app.language.videos import Run, loading, read_features, training_videos
from tubelet.probing import fine_tuning
from tubelet.runtime.distributed import World
from tubelet.runtime.watchdog import Watchdog


def main(options: Options, world: World) -> None:
    """Train to the last epoch, or continue the run in the folder; then write texts and measure them."""
    options = fine_tuning.resolve(options, world)
    lists = read_lists(options)
    text = build_text_encoder(options, lists.texts(), world)
    model = build_model(options, text, lists.answers).to(world.device)
    zero_shot = options.evaluation.zero_shot
    labelled = zero_shot_records(zero_shot) if zero_shot else []
    described = itertools.chain(lists.train, lists.val, *lists.further.values(), labelled)
    features = read_features(options, model, list(described), world)

    videos = training_videos(options, lists.train_samples(), text, features)
    fine_tuning.train(model, options, videos, loading(options, features), world, data_state=lists)
    if world.is_main and options.language_model.folder is None:
        text.tokenizer.save_pretrained(f"{options.folder}/tokenizer")
    with Watchdog(world, options.distributed.timeout) as watchdog:
        evaluate(model, lists, len(videos), Run(options, text, features, world, watchdog))
