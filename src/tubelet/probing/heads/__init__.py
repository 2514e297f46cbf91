"""Heads that read the tokens of a frozen encoder, a file a head, and their training side by side.

To add a head, add a file with a subclass of `Head` and a factory of it, such as
`my_head = functools.partial(MyHead)`; `head: {name: my_head, …}` selects it. Its options are the annotated arguments of
the constructor, except those that the program sets: `embed_dim`, `num_classes`, `num_slots` (time slots of a
prediction) and `num_samples` (of a `FittedHead`). `num_heads` is the encoder's by default.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor, nn

from tubelet.config import Config, ConfigError
from tubelet.config.factories import Factory, FactoryOptions, product
from tubelet.models.interfaces import Encoder
from tubelet.runtime.seeds import seed_for

HEADS = Factory(
    "heads",
    "tubelet.probing.heads",
    marker="reads",
    default="attentive",
    skip=("embed_dim", "num_classes", "num_slots", "num_samples"),
    rename={"depth": "num_probe_blocks"},  # V-JEPA 2's name
    inherit=("num_heads",),
)
VJEPA_OPTIONS = ("num_heads", "num_probe_blocks")
"""Of V-JEPA 2's section `classifier`, which may be given with any head."""


def _drop_lacking(raw: Any) -> Any:
    """Drop the options of V-JEPA 2's attentive head that another head does not have."""
    if not isinstance(raw, dict):
        return raw
    try:
        fields = HEADS.locate(HEADS.with_name(raw))[0].model_fields
    except (ConfigError, ValueError):  # which checking the options reports
        return raw
    return {name: value for name, value in raw.items() if name in fields or name not in VJEPA_OPTIONS}


HeadOptions = Annotated[FactoryOptions, HEADS, BeforeValidator(_drop_lacking)]
"""Type of an option that selects a head: its name, or `{name: attentive, **arguments of the constructor}`."""


def _learns_by_gradient(options: FactoryOptions) -> FactoryOptions:
    if issubclass(head_class(options), FittedHead):
        raise ValueError(f"{options.name}: it cannot train an encoder; choose a head like attentive or linear")
    return options


TrainedHeadOptions = Annotated[HeadOptions, AfterValidator(_learns_by_gradient)]
"""`HeadOptions` without those of a `FittedHead`, for training the encoder."""

Reads = Literal["tokens", "mean", "slots"]


class Head(nn.Module):
    """Base class of heads: tokens [B, N, D] -> logits [B, num_classes].

    A head that reads means gets all tokens of the clips or the means of their time slots, with equal results (`pool`).
    """

    built_from: dict[str, Any]
    reads: ClassVar[Reads] = "tokens"
    """What it reads of a clip: all tokens, their mean, or the mean of each time slot. No more is kept of stored
    features. `set_statistics` is called before the training of heads that read means."""

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation [n · D] over the training set of the n means that the head reads."""

    @staticmethod
    def forward_together(heads: Sequence["Head"], tokens: Tensor) -> Tensor:
        """Logits [G, B, num_classes] of G heads of this class on the same tokens; override it to share work."""
        return torch.stack([head(tokens) for head in heads])


class FittedHead(Head):
    """Base class of heads that learn from all training samples at once instead of by gradient descent."""

    grid_option: ClassVar[str]
    """Option with a sequence of values. A head is fitted for each of them, as for each learning rate of other heads."""

    @abstractmethod
    def fit(self, tokens: Tensor, labels: Tensor) -> None:
        """Learn from the training samples.

        Args:
            tokens: [n, N, D], what the head reads of each sample.
            labels: int64 [n].
        """


class Heads(nn.Module):
    """G heads of one class on the same tokens.

    Their losses are summed, so that each head gets the gradient that it would get alone.
    """

    def __init__(self, heads: Sequence[Head]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, D] -> logits [G, B, num_classes]."""
        return type(self.members[0]).forward_together(self.members, tokens)

    @property
    def members(self) -> list[Head]:
        return cast(list[Head], list(self.heads))


def head_class(options: FactoryOptions) -> type[Head]:
    """Return the class of the head of these options."""
    head = product(options.factory)
    assert head is not None
    assert issubclass(head, Head)
    return head


def build_head(
    options: Config | dict[str, Any] | str, encoder: Encoder, num_classes: int, *, num_slots: int = 1
) -> Head:
    """Build a head for the tokens of `encoder`.

    Args:
        options: Value of an option of type `HeadOptions`, as checked or as in YAML.
        encoder: Encoder with the attribute `embed_dim` and, for an attentive head, `num_heads`.
        num_classes: Number of logits.
        num_slots: Time slots of the tokens of one prediction.

    Returns:
        The head. Its attribute `built_from` holds, as JSON types, what `rebuild_head` needs.
    """
    sizes = {"embed_dim": encoder.embed_dim, "num_classes": num_classes, "num_slots": num_slots}
    if hasattr(encoder, "num_heads"):
        sizes["num_heads"] = encoder.num_heads
    return rebuild_head({"head": HEADS.parse(options).model_dump(mode="json"), **sizes})


def rebuild_head(built_from: dict[str, Any]) -> Head:
    """Build a head like the one whose `built_from` is given."""
    sizes = {name: value for name, value in built_from.items() if name != "head"}
    head = HEADS.parse(built_from["head"]).build(**sizes)
    head.built_from = built_from
    return head


def build(make: Callable[[], Head], count: int, seed: int) -> Heads:
    """`count` heads of `make()` that start from the same weights, a function of `seed`."""

    def head() -> Head:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "head"))
            return make()

    return Heads([head() for _ in range(count)])


def read_out(heads: nn.Module, tokens: Tensor, attend_across_segments: bool) -> Tensor:
    """Logits [G, B, P, num_classes] of P predictions for each video.

    Args:
        heads: `Heads`, or a wrapper of it for several processes.
        tokens: [B, segments, views, N, D].
        attend_across_segments: One prediction for each view from the tokens of all its segments, concatenated as in
            V-JEPA (P = views); otherwise one for each segment and view (P = segments · views).
    """
    flat = per_prediction(tokens, attend_across_segments).flatten(0, 1)
    return rearrange(heads(flat), "G (B P) c -> G B P c", B=len(tokens))


def per_prediction(tokens: Tensor, attend_across_segments: bool) -> Tensor:
    """Tokens [B, segments, views, N, D] -> [B, P, n, D], the tokens of each of P predictions, see `read_out`."""
    if attend_across_segments:
        return rearrange(tokens, "B s v N D -> B v (s N) D")
    return rearrange(tokens, "B s v N D -> B (s v) N D")


def pool(tokens: Tensor, num_slots: int) -> Tensor:
    """Mean tokens of time slots.

    Args:
        tokens: [..., N, D] in time-major order.
        num_slots: Number of slots; 1 for the mean of all tokens.

    Returns:
        float32 [..., num_slots, D]. Of means of these or of shorter slots, it returns the same.
    """
    return tokens.float().unflatten(-2, (num_slots, -1)).mean(-2)


def loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each head [G].

    Args:
        logits: [G, B, P, num_classes] of P predictions for each video.
        labels: Classes [B], or probabilities of each class [B, num_classes].
        label_smoothing: As in `torch.nn.functional.cross_entropy`.
    """
    G, _, P, _ = logits.shape
    targets = labels.repeat_interleave(P, dim=0)
    targets = torch.cat([targets] * G)
    losses = F.cross_entropy(logits.float().flatten(0, 2), targets, reduction="none", label_smoothing=label_smoothing)
    return losses.view(G, -1).mean(1)


def probabilities(logits: Tensor) -> Tensor:
    """Probabilities [G, B, num_classes]: means over the P predictions of logits [G, B, P, num_classes]."""
    return logits.float().softmax(-1).mean(2)
