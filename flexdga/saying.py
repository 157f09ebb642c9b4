"""What is said once in a process, by whatever part of flexdga comes to it first."""

from __future__ import annotations

import logging

log = logging.getLogger("flexdga")
_said: set[str] = set()


def first_time(text: str) -> bool:
    """Whether nobody asked before; not for a compiler to trace."""
    new = text not in _said
    _said.add(text)
    return new


def warn_once(text: str) -> None:
    """To the log; likewise."""
    if first_time(text):
        log.warning(text)
