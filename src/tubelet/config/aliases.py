"""Keys of V-JEPA and of earlier versions, and the canonical ones that `tubelet.config.translation` turns them into.

To rename a key, add an `Alias` to the table of its programs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alias:
    """A key with another name, as dotted paths. `*` at the end of both stands for all keys of a section.

    Args:
        old: The other name.
        new: The canonical names. An option that several parts have is set in all of them.
        deprecated: Log a warning. V-JEPA's names are accepted without one.
        unset: Value that is the same as not giving the key. So a part that lacks the option is no error.
    """

    old: str
    new: tuple[str, ...]
    deprecated: bool = False
    unset: Any = ...

    @property
    def is_section(self) -> bool:
        return self.old.endswith(".*")

    def covers(self, path: str) -> bool:
        """Return whether a dotted key is the old name, or the section of that name, or a key in it."""
        section = self.old.removesuffix(".*")
        return path == section or self.is_section and path.startswith(f"{section}.")


# Options that V-JEPA sets once for encoder and predictor, with their defaults.
SHARED = {
    "uniform_power": True,
    "use_rope": False,
    "rope_pairing": "interleaved",
    "use_silu": False,
    "wide_silu": True,
    "init_std": 0.02,
    "use_activation_checkpointing": False,
}
NOT_IN_VJEPA = ("rope_pairing", "init_std")


def _encoder(section: str, encoder: str, predictor: str | None = None, *, changes: bool = False) -> Iterator[Alias]:
    """Yield the aliases of a section that chooses the encoder, and with `predictor` the predictor.

    Args:
        section: The section.
        encoder: Canonical section of the encoder.
        predictor: Canonical section of the predictor.
        changes: The options are changes to those in a file of weights, where null is no change.
    """
    null = None if changes else ...
    yield Alias(f"{section}.encoder", (f"{encoder}.module",), deprecated=True, unset=null)
    yield Alias(f"{section}.model_name", (f"{encoder}.name",), unset=null)
    yield Alias(f"{section}.encoder_args.*", (f"{encoder}.*",), deprecated=True)
    for name, default in SHARED.items():
        targets = (f"{encoder}.{name}", *([f"{predictor}.{name}"] if predictor else []))
        unset = null if changes else default
        yield Alias(f"{section}.{name}", targets, deprecated=name in NOT_IN_VJEPA, unset=unset)


def _predictor(section: str, predictor: str | None) -> Iterator[Alias]:
    for name in ("depth", "embed_dim", "num_heads"):
        yield Alias(f"{section}.pred_{name}", (f"{predictor}.{name}",) if predictor else ())
    for name in ("use_mask_tokens", "zero_init_mask_tokens"):
        yield Alias(f"{section}.{name}", (f"{predictor}.{name}",) if predictor else ())
    for name in ("noise_schedule", "noise_beta", "noise_steps"):
        yield Alias(f"{section}.{name}", (f"{predictor}.{name}",) if predictor else (), deprecated=True)


FORMAT = Alias("data.dataset_type", ("data.format.name",))
BAD_FILES = Alias("data.max_bad_share", ("data.max_bad_fraction",), deprecated=True)

PRETRAINING = (
    *_encoder("model", "encoder", "objective.predictor"),
    *_predictor("model", "objective.predictor"),
    *(Alias(f"loss.{name}", (f"objective.{name}",)) for name in ("loss_exp", "reg_coeff")),
    *(
        Alias(f"loss.{name}", (f"objective.{name}",), deprecated=True)
        for name in ("std_coeff", "std_floor", "inv_coeff", "cov_coeff")
    ),
    Alias("optimization.ema", ("objective.ema",)),
    FORMAT,
    BAD_FILES,
)
# The section also existed for a linear head, with its defaults.
HEAD = (
    Alias("classifier.num_heads", ("head.num_heads",), unset=None),
    Alias("classifier.num_probe_blocks", ("head.num_probe_blocks",), unset=1),
)
HOLDOUT = Alias("optimization.holdout_share", ("optimization.holdout_fraction",), deprecated=True)
PROBE = (*_encoder("pretrain", "pretrain.encoder", changes=True), *HEAD, FORMAT, HOLDOUT)
BASELINES = (Alias("floors", ("kinds",), deprecated=True),)
# Of a pretraining's section `model` such a program uses the encoder only.
CLASSIFICATION = (*_encoder("model", "encoder"), *_predictor("model", None), *PROBE)
GENERATION = (*_encoder("model", "encoder"), *_predictor("model", None), FORMAT, BAD_FILES)


def _study(prefix: str = "") -> Iterator[Alias]:
    """Yield the aliases of a study's options, which have the `prefix` in the file of the zoo."""
    for old, new in (("floors", "baselines"), ("seconds.floors", "seconds.baselines")):
        yield Alias(f"{prefix}{old}", (f"{prefix}{new}",), deprecated=True)
    for name in ("kinds", "num_frames", "average"):
        yield Alias(f"{prefix}floors.{name}", (f"{prefix}baselines.{name}",), deprecated=True)


# By the value of `app` or `eval_name`; None: studies and the zoo, which have neither.
TABLES: dict[str | None, tuple[Alias, ...]] = {
    "vjepa": PRETRAINING,
    "classification": CLASSIFICATION,
    "generation": GENERATION,
    "video_classification_frozen": PROBE,
    "image_classification_frozen": PROBE,
    "baselines": BASELINES,
    None: (*_study(), *_study("study.")),
}
# Sections that select parts: a name is short for {name: …}.
PARTS = ("encoder", "objective", "objective.predictor", "head", "data.format")
# Parts whose options depend on their name, with the default name: naming another part drops the options.
SELECTED = {"objective": "vjepa", "data.format": "video_dataset", "head": "attentive"}
# Removed sections: the canonical sections that setting one on the command line replaces, and the keys
# there that do not belong to it.
REPLACED: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {"encoder": (), "objective.predictor": ()},
    "model.encoder_args": {"encoder": ("name", "module", *SHARED)},
    "pretrain.encoder_args": {"pretrain.encoder": ("name", "module", *SHARED)},
    "loss": {"objective": ("name", "predictor", "ema")},
    "classifier": {"head": ("name",)},
}
# Renamed programs.
PROGRAMS = {"eval_name": {"floors": "baselines"}}
