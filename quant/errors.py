"""Everything that can go wrong while reading, quantizing or judging a checkpoint.

QuantError
├── CheckpointError      the folder or file given as a model cannot be used
│   └── UnsupportedModelError   it is a model, of a kind we do not handle
├── CalibrationError     the calibration text does not do
├── OptionError          two options, or an option and the model, contradict each other
│   └── RecipeError      a recipe file cannot be read or understood
├── GateError            the result is worse than the limit that was given
└── OutputError          the result cannot be written where it was asked
"""

from __future__ import annotations


class QuantError(Exception):
    """Root of this folder. The message says what was given, what was expected and what to do."""


class CheckpointError(QuantError):
    """The folder or file given as a model cannot be used."""


class UnsupportedModelError(CheckpointError):
    """A model of an architecture or format that is not handled."""


class CalibrationError(QuantError):
    """The calibration or evaluation text does not do."""


class OptionError(QuantError):
    """Options that contradict each other or the model."""


class OutputError(QuantError):
    """The result cannot be written where it was asked."""


class GateError(QuantError):
    """A result that is worse than the limit that was given."""


class RecipeError(OptionError):
    """A recipe file that cannot be read or understood."""
