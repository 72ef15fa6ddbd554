"""Measurements against other implementations, or against what the hardware can do; every speed is a ratio."""
