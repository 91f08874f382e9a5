"""Stacks of units, evaluated and inverted: fast by hand, and in differentiable operations."""
