"""Fixtures of the operations' tests."""

from mean_problems import problem

__all__ = ["problem"]
