"""Samplers and training helpers of rectified flows."""
