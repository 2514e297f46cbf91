"""Build the models: encoder, bridge and language model."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from app.language.options import Options
from tubelet.language.packages import METRICS, MODELS, check_installed
from tubelet.language.prefix_lm import PrefixLanguageModel, build_language_model
from tubelet.language.tokenizer import TextEncoder, learn_tokenizer, load_tokenizer, parse_tokenizer
from tubelet.models.interfaces import Encoder
from tubelet.objectives.video_text_alignment import VideoTextAlignment
from tubelet.objectives.video_to_answer import VideoToAnswer
from tubelet.objectives.video_to_text import Bridge, LinearHead, VideoToText
from tubelet.probing.fine_tuning import initial_encoder
from tubelet.runtime.distributed import World
from tubelet.runtime.seeds import seed_for

Model: TypeAlias = VideoToText | VideoToAnswer | VideoTextAlignment


def build_text_encoder(options: Options, texts: list[str], world: World) -> TextEncoder:
    """Return the tokenizer of the language model's folder, or learn one from the texts.

    Raises:
        ConfigError: The folder has no tokenizer, or a package is missing.
    """
    check_installed((*MODELS, *(METRICS if options.task == "captioning" else ())))
    language_model = options.language_model
    if language_model.folder is None:
        content = world.broadcast_from_rank0(lambda: learn_tokenizer(texts, language_model.vocab_size))
        tokenizer = parse_tokenizer(content)
    else:
        tokenizer = load_tokenizer(language_model.folder)
    return TextEncoder(tokenizer, options.text.max_prompt, options.text.max_target)


def build_model(options: Options, text: TextEncoder, answers: Sequence[str]) -> Model:
    """Build the model of the task with its initial weights, a function of the seed.

    Args:
        options: The options.
        text: The tokenizer.
        answers: The answers to choose from where they are classified.

    Raises:
        ConfigError: The encoder does not fit the clips, or the language model cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(options.meta.seed, "language"))
        return _align(options, text) if options.task == "retrieval" else _write(options, text, answers)


def _write(options: Options, text: TextEncoder, answers: Sequence[str]) -> VideoToText | VideoToAnswer:
    encoder, pooler = initial_encoder(options), options.pooler
    length = pooler.num_queries + options.text.max_prompt + (0 if answers else options.text.max_target)
    language_model = _language_model(options, text, length)
    width = language_model.embed_dim
    bridge = _bridge(encoder, options, pooler.num_queries, width)
    if answers:
        return VideoToAnswer(encoder, bridge, language_model, LinearHead(width, len(answers)), **_encoding(options))
    return VideoToText(encoder, bridge, language_model, **_encoding(options))


def _align(options: Options, text: TextEncoder) -> VideoTextAlignment:
    encoder, width = initial_encoder(options), options.alignment.embed_dim
    language_model = _language_model(options, text, options.text.max_target)
    bridge = _bridge(encoder, options, 1, width)
    head = LinearHead(language_model.embed_dim, width)
    temperature = options.alignment.temperature
    return VideoTextAlignment(encoder, bridge, language_model, head, temperature=temperature, **_encoding(options))


def _bridge(encoder: Encoder, options: Options, num_queries: int, width: int) -> Bridge:
    pooler = options.pooler
    return Bridge(encoder.embed_dim, encoder.num_heads, num_queries, pooler.depth, width, pooler.init_std)


def _language_model(options: Options, text: TextEncoder, max_length: int) -> PrefixLanguageModel:
    return build_language_model(
        options.language_model, vocab_size=len(text.tokenizer), pad=text.pad, end=text.end, max_length=max_length
    )


def _encoding(options: Options) -> dict[str, Any]:
    """Return the arguments of `VideoEncoding`."""
    return {
        "mean": options.data.normalize_mean,
        "std": options.data.normalize_std,
        "frozen": not options.train_encoder,
        "blind": options.blind,
        "encoder_layer_decay": options.optimization.layer_decay,
    }
