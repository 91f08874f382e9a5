"""Eleven hierarchies with reference draws, as Pyro models that are written as people write them."""
