"""Linear probe that knows the order of time: a linear layer on the mean tokens of all time slots."""

import functools

from tubelet.probing.heads.linear import LinearHead


class LinearSlotsHead(LinearHead):
    """Linear classifier of the standardized mean tokens of the time slots, concatenated in their order.

    What is in a slot depends on its frames; unlike the mean token, the concatenation also tells in which order they
    were. Where a prediction is made from several segments, it has the slots of all of them.
    """

    reads = "slots"

    def __init__(self, embed_dim: int, num_classes: int, num_slots: int):
        super().__init__(num_slots * embed_dim, num_classes)
        self.num_slots = num_slots


linear_slots = functools.partial(LinearSlotsHead)
