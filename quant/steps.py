"""The steps that choose the codes of a weight, and which of them a run takes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

DEFAULT_DAMPING = 0.01
"""Share of the mean diagonal added to a Gram matrix: the text never shows the whole truth about the
inputs."""


class Transform(Enum):
    """What is done to the inputs of a stage, and undone in the layer before it."""

    NONE = "none"

    SCALE = "scale"
    """Scales that make the weights easier to round."""

    PUBLISHED_SCALE = "published scale"
    """The same as AWQ searches them."""

    SMOOTH = "smooth"
    """Scales that share the difficulty of rounding between weights and activations."""

    PUBLISHED_SMOOTH = "published smooth"
    """The same with the exponents that SmoothQuant fixes, behind norms alone."""


class Range(Enum):
    """How far the grid of a group reaches."""

    FULL = "full"
    """From its least to its greatest weight."""

    SEARCHED = "searched"
    """As suits the inputs best, either end on its own."""

    SHRUNK = "shrunk"
    """As AWQ searches it: both ends drawn in by the same share."""


class Rounding(Enum):
    """How a code is picked for each weight."""

    NEAREST = "nearest"
    """The nearest one."""

    FEEDBACK = "feedback"
    """What rounding one input does wrong is made up for by the inputs after it, then codes and
    group scales are improved in turn (GPTQ, coordinate descent, refit): free at run time. What the
    layers before did wrong is made up for too, where the float model runs beside."""

    PUBLISHED_FEEDBACK = "published feedback"
    """GPTQ as published: each input once, in groups that span what is left of their weights."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The choice made at every step.

    damping: share of the mean diagonal that error feedback adds to the Gram matrix.
    activation_order: groups collect inputs by falling importance instead of by their order.
    """

    transform: Transform = Transform.SCALE
    range: Range = Range.SEARCHED
    rounding: Rounding = Rounding.FEEDBACK
    damping: float = DEFAULT_DAMPING
    activation_order: bool = False

    @property
    def follow_float_model(self) -> bool:
        """Whether the float model is run beside, to make up for what is lost on the way."""
        return self.rounding is Rounding.FEEDBACK
