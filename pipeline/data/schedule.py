"""Which view of each image an epoch shows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .views import LISTED, ViewPolicy, listed

FIXED_SEED = 0
"""Views that are to be met again, by other epochs and by runs with other seeds, are drawn with this seed."""


@dataclass(frozen=True)
class Schedule:
    """View numbers by epoch; the views themselves are drawn with ``view_seed``.

    - ``views`` is None: a new view each epoch, drawn with the run's seed.
    - ``views`` V: V fixed views in turn, the same for runs of every seed.
    - V at least as many as there are different views: each epoch's new view, by the run's seed, named by its
      number in the list of them.
    """

    policy: ViewPolicy
    seed: int
    views: int | None = None

    @property
    def complete(self) -> bool:
        """Whether every view there is belongs to the fixed ones, so that the draw is free."""
        count = self.policy.count
        return (
            self.views is not None
            and count is not None
            and self.views >= count
            and self.policy.kind == "pad_crop"
        )

    @property
    def fixed(self) -> int | None:
        """V, or fewer where there are not so many different views; None: a new view each epoch."""
        if self.views is None:
            return None
        if self.complete or self.policy.count == 1:
            return self.policy.count
        return self.views

    @property
    def view_seed(self) -> int:
        return self.seed if self.views is None else FIXED_SEED

    def numbers(self, keys: Tensor, epoch: int) -> Tensor:
        """The view number of each image [N] in an epoch."""
        if self.complete:
            return listed(self.policy, self.seed, keys, torch.full_like(keys, epoch))
        return torch.full_like(keys, epoch if self.fixed is None else epoch % self.fixed)

    def needed(self, epoch: int) -> range:
        """The view numbers that may come up in an epoch."""
        if self.complete:
            assert self.policy.count is not None
            return range(LISTED, LISTED + self.policy.count)
        view = epoch if self.fixed is None else epoch % self.fixed
        return range(view, view + 1)

    def used(self, epochs: int) -> range:
        """The view numbers that may come up in so many epochs."""
        if self.complete:
            return self.needed(0)
        return range(epochs if self.fixed is None else min(epochs, self.fixed))
