"""Progress bars: for people who watch, and none in a log."""

from __future__ import annotations

from tqdm.auto import tqdm

Bar = tqdm


def progress_bar(label: str, total: int, shown: bool, *, initial: int = 0) -> Bar:
    """A bar in a notebook, or where standard error is a terminal; else, or not shown, a silent one.

    In a log each refresh would be a line.
    """
    # None is tqdm's word for "on a terminal only"; its bars of notebooks take that for shown.
    return tqdm(desc=label, total=total, initial=initial, disable=None if shown else True)
