"""Every error that fomoh_fx raises on purpose: what happened, where, why, and what to do."""

from __future__ import annotations


class FomohError(Exception):
    """Base class of the errors of this package."""


class CaptureError(FomohError):
    """The model could not be captured as one graph that is valid for every input of its signature."""


class UnsupportedOpError(FomohError):
    """An operator on the path of a derivative has no rule, and none could be synthesised exactly."""


class ArgumentError(FomohError, ValueError):
    """An argument of the public interface does not fit; the message begins with the argument's name."""


class SpecialisationError(FomohError):
    """A compiled module was called at a signature that has not been traced."""


class VerificationError(FomohError):
    """A pass left an invalid graph behind: a defect of fomoh_fx, never of the model."""
