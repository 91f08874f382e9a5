"""The installed package: its version, and another one that has the same import name."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, distribution

VERSION = "0.1.0"  # pyproject.toml and CITATION.cff follow


def warn_of_another() -> None:
    """Warns if the distribution ``pyroflow``, another library, is installed beside this one.

    Both have a folder ``pyroflow``. In one place the files of the two are mixed; in two places
    the first one on ``sys.path`` hides the other. An editable installation of this library under
    that name holds no such folder, and is no other.
    """
    try:
        other = distribution("pyroflow")
    except PackageNotFoundError:
        return
    files = other.files
    if files is None or any(file.parts[0] == "pyroflow" for file in files):
        warnings.warn(
            f"two distributions with the import name pyroflow are installed: pyroflow-ppl "
            f"{VERSION}, which this is, and pyroflow {other.version}, another library, in "
            f"{other.locate_file('')}. Modules of the two may be mixed, or one hides the other. "
            "Keep one: pip uninstall pyroflow pyroflow-ppl, then pip install pyroflow-ppl",
            stacklevel=3,
        )
