"""How a language model writes: greedy decoding, beam search, sampling."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tubelet.config import Config


class DecodingConfig(Config):
    """YAML section `decoding`: how texts are written."""

    num_beams: int = Field(1, ge=1)
    """Beams of beam search; 1: greedy."""
    sample: bool = False
    """Draw each token from the distribution, with `temperature` and `top_p`."""
    temperature: float = Field(1.0, gt=0)
    """Factor that the logits are divided by before sampling."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the most likely tokens that have this probability together."""

    def arguments(self, max_new_tokens: int, seeds: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`.

        Args:
            max_new_tokens: Length of the texts.
            seeds: Of each text, which is a function of it and does not depend on the others.
        """
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": self.num_beams, "do_sample": False}
        if self.sample:
            steps = [TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p), GumbelNoise(seeds)]
            arguments["logits_processor"] = LogitsProcessorList(steps)
        return arguments

    @model_validator(mode="after")
    def _one_way(self) -> "DecodingConfig":
        if not self.sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError("temperature and top_p need sample: true")
        if self.sample and self.num_beams > 1:
            raise ValueError("sample: true draws one text; remove num_beams, or sample")
        return self


class GumbelNoise:
    """Adds noise to logits [B, vocab] such that the largest is a draw from their softmax (Gumbel-max)."""

    def __init__(self, seeds: Sequence[int]):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self._generators]
        return scores - torch.stack(rows).to(scores.device).log()
