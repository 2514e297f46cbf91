"""No masks: batches for supervised training and for probes."""

from typing import Any

from torch.utils.data import default_collate


class DefaultCollator:
    """Collates a batch and masks nothing; stands where a mask collator would."""

    def __call__(self, batch: list) -> tuple[Any, None, None]:
        """A list of samples to (collated samples, None, None)."""
        return default_collate(batch), None, None
