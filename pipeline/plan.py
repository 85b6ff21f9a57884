"""How long, how fast and in which parts a network learns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    epochs: int
    batch_size: int
    """Images of a step, over all ranks."""
    optimizer: str
    lr: float
    schedule: str
    milestones: tuple[int, ...]
    warmup_epochs: float
    weight_decay: float
    decay_all: bool
    label_smoothing: float
    seed: int
    micro_batch: int | None = None
    """Images that a rank has on its device at once; None: all of its share of a step."""

    def steps(self, images: int) -> int:
        """Steps of an epoch: full batches only, and one where there are fewer images than a batch holds."""
        return max(1, images // self.batch_size)
