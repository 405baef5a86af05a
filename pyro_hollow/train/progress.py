# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A progress bar for terminals that becomes occasional lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm  # Pyro needs it, too

__all__ = ["LINE_INTERVAL", "Progress"]

#: Seconds between two lines of a bar that is not shown in a terminal.
LINE_INTERVAL = 60.0


class Progress(tqdm):
    """
    A progress bar that vanishes when it ends. Where its stream is not a terminal, it writes a line at most every
    :data:`LINE_INTERVAL` seconds, none in less time than that: a file has no use for a bar that is redrawn.

    :param args: as of :class:`tqdm.tqdm`.
    :param kwargs: as of :class:`tqdm.tqdm`, whose ``leave`` is False here and whose ``mininterval`` is 1 s.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._next_line = time.monotonic() + LINE_INTERVAL
        super().__init__(*args, **{"leave": False, "mininterval": 1.0, **kwargs})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Redraws the bar in a terminal, or writes a line if the last one is old enough."""
        if self.fp.isatty():
            return super().display(msg, pos)
        if msg is None and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_INTERVAL
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False  # there is nothing to remove when the bar ends
