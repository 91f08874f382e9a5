"""Ten posteriors with reference draws, as Pyro models, and how far guides end from them."""
