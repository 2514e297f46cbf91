"""No masks: batches for supervised training and for probes."""

from typing import Any

from torch.utils.data import default_collate


class DefaultCollator:
    """Collates a batch without masks; has the interface of a mask collator."""

    def __call__(self, batch: list) -> tuple[Any, None, None]:
        """Return (collated samples, None, None) for a list of samples."""
        return default_collate(batch), None, None
