"""Mean and covariance of a training set, in one pass over it; its principal components."""

from __future__ import annotations

from pyflocality.moments.basis import Basis
from pyflocality.moments.limits import check_moments_fit
from pyflocality.moments.moments import Moments

__all__ = ["Basis", "Moments", "check_moments_fit"]
