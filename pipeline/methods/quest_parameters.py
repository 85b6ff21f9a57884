"""QuEST's parameters: what ``--set quest.KEY=VALUE`` may say."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from . import base

DELTA = 10.0
"""δ where none is asked for; OBoW has 10 to 15."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | float | int) else value


def _alone(value: tuple[float, ...]) -> float | list[float]:
    return value[0] if len(value) == 1 else list(value)


Taus = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_listed), PlainSerializer(_alone)]

Levels = Annotated[
    tuple[Annotated[str, Field(pattern=r"^map(_pre|@(0|-?[1-9]\d*))?$")], ...], BeforeValidator(_listed)
]


class Parameters(base.Parameters):
    """Symbols as in ``quest.py``."""

    words: int | None = Field(
        None, ge=2, description="K, the size of the vocabulary; none: 4096, or fewer with little data"
    )
    tau: Taus | None = Field(
        None, description="τ of the teacher's soft assignment, or one for each level; none: μ/δ"
    )
    delta: float = Field(DELTA, gt=0, description="δ: the scale-free temperature is μ/δ")
    alpha: float = Field(1.0, gt=0, description="α, the weight of the loss")
    gamma: float = Field(3.0, gt=0, description="γ at the start of training")
    levels: Levels = Field(("map",), min_length=1, description="feature maps to use: map, map@1, map@-2 …")
    iterations: int = Field(20, ge=1, description="k-means iterations")
    features: int | None = Field(
        None, ge=2, description="how many features k-means may use; none: all of them"
    )
    top: int | None = Field(
        None,
        ge=1,
        description="m, the likeliest words that p_T keeps at each position; none: all of them, "
        "or in a store so many that no more than 6 % of it is lost",
    )
    positions: int | None = Field(
        None, ge=1, description="positions drawn for each image and epoch; none: all of them"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "Parameters":
        if len(set(self.levels)) < len(self.levels):
            raise ValueError("a level is named twice in levels; name each once")
        if self.tau is not None and self.delta != DELTA:
            raise ValueError("delta has no effect beside tau; give one of them")
        if self.tau is not None and len(self.tau) not in (1, len(self.levels)):
            raise ValueError(
                f"{len(self.tau)} values of tau for {len(self.levels)} levels; give one, or one each"
            )
        return self

    def temperature(self, level: str, mu: float) -> float:
        """τ of a level, where the mean squared distance to the nearest word is μ."""
        if self.tau is None:
            return mu / self.delta
        return self.tau[self.levels.index(level)] if len(self.tau) > 1 else self.tau[0]
