"""Mean and covariance of a training set, in one pass over it."""

from __future__ import annotations

from pyflocality.moments.moments import Moments, check_moments_fit

__all__ = ["Moments", "check_moments_fit"]
