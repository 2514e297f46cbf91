"""The published models of V-JEPA, V-JEPA 2 and V-JEPA 2.1.

From the READMEs, the configurations and `hubconf.py` of facebookresearch/jepa and facebookresearch/vjepa2.
"""

from collections.abc import Iterable
from typing import NamedTuple

from tubelet.models.vision_transformer import SIZES


class Published(NamedTuple):
    """A published model. `num_heads` and `pred_num_heads`, of its encoder and predictor, follow from no shape."""

    file: str
    family: str
    name: str
    embed_dim: int
    depth: int
    num_heads: int
    pred_num_heads: int
    img_size: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.family} {self.name}"


PUBLISHED = (
    Published("vitl16.pth.tar", "V-JEPA", "ViT-L/16", 1024, 24, 16, 16, 224, 16),
    Published("vith16.pth.tar", "V-JEPA", "ViT-H/16", 1280, 32, 16, 16, 224, 16),
    Published("vith16-384.pth.tar", "V-JEPA", "ViT-H/16-384", 1280, 32, 16, 16, 384, 16),
    Published("vitl.pt", "V-JEPA 2", "ViT-L/16", 1024, 24, 16, 12, 256, 64),
    Published("vith.pt", "V-JEPA 2", "ViT-H/16", 1280, 32, 16, 12, 256, 64),
    Published("vitg.pt", "V-JEPA 2", "ViT-g/16", 1408, 40, 22, 12, 256, 64),
    Published("vitg-384.pt", "V-JEPA 2", "ViT-g/16-384", 1408, 40, 22, 12, 384, 64),
    Published("vjepa2-ac-vitg.pt", "V-JEPA 2", "AC ViT-g/16", 1408, 40, 22, 16, 256, 64),
    Published("vjepa2_1_vitb_dist_vitG_384.pt", "V-JEPA 2.1", "ViT-B/16-384", 768, 12, 12, 12, 384, 64),
    Published("vjepa2_1_vitl_dist_vitG_384.pt", "V-JEPA 2.1", "ViT-L/16-384", 1024, 24, 16, 12, 384, 64),
    Published("vjepa2_1_vitg_384.pt", "V-JEPA 2.1", "ViT-g/16-384", 1408, 40, 22, 12, 384, 64),
    Published("vjepa2_1_vitG_384.pt", "V-JEPA 2.1", "ViT-G/16-384", 1664, 48, 26, 12, 384, 64),
)
PRED_WIDTH = 384
"""Width of all published predictors of masked tokens."""
V1_MASK_TOKENS, V2_MASK_TOKENS = 2, 10
"""Mask tokens of the published predictors of V-JEPA and of V-JEPA 2."""


def of_size(embed_dim: int, depth: int) -> tuple[Published, ...]:
    """Return the published models with an encoder of this size."""
    return tuple(model for model in PUBLISHED if (model.embed_dim, model.depth) == (embed_dim, depth))


def named(models: Iterable[Published], file: str) -> Published | None:
    """Return the model that was published under this file name."""
    return next((model for model in models if model.file == file), None)


def usual_heads(embed_dim: int, depth: int) -> tuple[str, int | None]:
    """Return the name of the encoder of this size, and its number of heads; None unless there is exactly one."""
    names = [name for name, size in SIZES.items() if (size["embed_dim"], size["depth"]) == (embed_dim, depth)]
    return (names[0], SIZES[names[0]]["num_heads"]) if len(names) == 1 else ("", None)
