"""Planar normalizing flows for Pyro, exact both ways."""

import lazy_loader

from pyroflow.distribution import VERSION, warn_of_another

# The public names, imported when they are asked for: the shell's help need not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = VERSION
warn_of_another()
