"""Options that select the labelled videos to train on; without torch, as programs that only plan read them, too."""

from pydantic import Field, model_validator

from tubelet.config import Config


class LabelSubset(Config):
    """How many of the labels are used; see `split.labelled_subset`. By default all."""

    labels_per_class: int | None = Field(None, ge=1)
    """Train on this number of videos of each class, drawn with the seed of the probe or run."""
    label_fraction: float | None = Field(None, gt=0, le=1)
    """Train on this fraction of the videos of each class, at least one, drawn likewise."""

    @property
    def is_all(self) -> bool:
        """Whether all labels are used."""
        return self.labels_per_class is None and self.label_fraction is None

    @model_validator(mode="after")
    def _one_number_of_labels(self) -> "LabelSubset":
        if self.labels_per_class is not None and self.label_fraction is not None:
            raise ValueError("labels_per_class and label_fraction given; keep one of them, the other null")
        return self
