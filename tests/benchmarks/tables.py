"""A table of results as Markdown."""

from __future__ import annotations

import pandas as pd


def markdown(frame: pd.DataFrame) -> str:
    """The columns and rows of a frame of text, without its index.

    Example:
        >>> print(markdown(pd.DataFrame({"K": ["2", "8"], "KL": ["0.253", "0.027"]})))
        | K | KL |
        | --- | --- |
        | 2 | 0.253 |
        | 8 | 0.027 |
    """
    lines = [list(frame), ["---"] * frame.shape[1], *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
