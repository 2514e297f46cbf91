"""Entry points of `torch.hub.load(<this repository>, name, ...)`.

Example:
    >>> encoder = torch.hub.load("path/to/this/repository", "load_encoder", "runs/demo", source="local")
"""

import sys
from pathlib import Path

dependencies = ["einops", "pydantic", "safetensors", "torch", "yaml"]

sys.path.insert(0, str(Path(__file__).parent / "src"))  # the package need not be installed

from tubelet.hub import load_encoder, load_predictor, load_probe  # noqa: E402, F401
from tubelet.models.vision_transformer import (  # noqa: E402, F401
    vit_base,
    vit_giant,
    vit_giant_xformers,
    vit_gigantic,
    vit_huge,
    vit_large,
    vit_small,
    vit_tiny,
)
