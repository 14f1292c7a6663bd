"""Trained networks that analytical denoisers are measured against."""
