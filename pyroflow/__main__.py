"""``python -m pyroflow`` is the command line."""

from pyroflow.cli import app

app()
