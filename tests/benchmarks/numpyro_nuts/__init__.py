"""numpyro's NUTS on the same posteriors, in a process and an environment of its own."""
