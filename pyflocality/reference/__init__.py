"""The truth: every operation in plain torch, exact in float64, on any device."""
