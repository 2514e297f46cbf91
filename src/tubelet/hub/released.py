"""Files that V-JEPA and V-JEPA 2 released."""

from typing import Any

from tubelet.config import ConfigError
from tubelet.grid import ClipShape
from tubelet.hub.weights import Architecture, Weights, as_sections


class ReleasedWeights(Weights):
    """A file of V-JEPA or V-JEPA 2, which does not say the architecture."""

    def architecture(self) -> dict[str, Any]:
        options = {"uniform_power": False, "rope_pairing": "vjepa2"}
        return {"encoder": options, "predictor": options, "sizes": {}}

    def _options(
        self, arguments: dict[str, Any], predictor: dict[str, Any] | None = None
    ) -> tuple[Architecture, ClipShape]:
        if "name" not in as_sections(arguments)["encoder"]:
            raise ConfigError(f"{self.path}: it does not say which encoder it holds; give model_name='vit_large', …")
        return super()._options(arguments, predictor)
