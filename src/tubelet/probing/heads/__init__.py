"""Heads that read the tokens of a frozen encoder, a file a head, and their training side by side.

To add a head, add a file with a subclass of `Head` and a factory of it, such as
`my_head = functools.partial(MyHead)`; `head: {name: my_head, …}` selects it. Its options are the annotated arguments of
the constructor, except `embed_dim` and `num_classes`, which the program sets; `num_heads` is the encoder's by default.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BeforeValidator
from torch import Tensor, nn

from tubelet.config import Config, ConfigError
from tubelet.config.registry import Factory, FactoryOptions, product
from tubelet.models.interfaces import Encoder
from tubelet.runtime.seeds import seed_for

HEADS = Factory(
    "heads",
    "tubelet.probing.heads",
    marker="uses_mean_token",
    default="attentive",
    skip=("embed_dim", "num_classes"),
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


class Head(nn.Module):
    """Base class of heads: tokens [B, N, D] -> logits [B, num_classes]."""

    built_from: dict[str, Any]
    uses_mean_token: ClassVar[bool] = False
    """The head reads nothing but the mean of the tokens. Then only that is stored of a clip, and `set_statistics` is
    called before training."""

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation [D] of the mean tokens of the training set."""

    @staticmethod
    def forward_together(heads: Sequence["Head"], tokens: Tensor) -> Tensor:
        """Logits [G, B, num_classes] of G heads of this class on the same tokens; override it to share work."""
        return torch.stack([head(tokens) for head in heads])


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


def uses_mean_token(options: FactoryOptions) -> bool:
    """Whether the head of these options reads nothing but the mean of the tokens."""
    head = product(options.factory)
    assert head is not None
    assert issubclass(head, Head)
    return head.uses_mean_token


def build_head(options: Config | dict[str, Any] | str, encoder: Encoder, num_classes: int) -> Head:
    """Build a head for the tokens of `encoder`.

    Args:
        options: Value of an option of type `HeadOptions`, as checked or as in YAML.
        encoder: Encoder with the attribute `embed_dim` and, for an attentive head, `num_heads`.
        num_classes: Number of logits.

    Returns:
        The head. Its attribute `built_from` holds, as JSON types, what `rebuild_head` needs.
    """
    sizes = {"embed_dim": encoder.embed_dim, "num_classes": num_classes}
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
    if attend_across_segments:
        flat = rearrange(tokens, "B s v N D -> (B v) (s N) D")
    else:
        flat = rearrange(tokens, "B s v N D -> (B s v) N D")
    return rearrange(heads(flat), "G (B P) c -> G B P c", B=len(tokens))


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
