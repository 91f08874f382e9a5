"""Exact draws from a posterior, with a fitted guide as map and as proposal."""
