"""Bottlenecks and couplings on the residual stream."""
