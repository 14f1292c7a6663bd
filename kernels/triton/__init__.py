"""Triton kernels and their launchers; nothing here is imported before one of them runs."""
