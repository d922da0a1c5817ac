"""What computed something, noted where that is decided, for reports: nothing falls back in silence."""

from __future__ import annotations

from contextvars import ContextVar

Notes = set[tuple[str, str]]  # (what, by what)

_NOTES: ContextVar[Notes | None] = ContextVar("kvlib_ran", default=None)


class Noting:
    """While entered, notes go to the given set."""

    def __init__(self, notes: Notes):
        self._notes = notes

    def __enter__(self) -> Notes:
        self._before = _NOTES.set(self._notes)
        return self._notes

    def __exit__(self, *raised: object) -> None:
        _NOTES.reset(self._before)


def note(what: str, by: str) -> None:
    """Note that `what` was computed by `by`, if anybody asks."""
    notes = _NOTES.get()
    if notes is not None:
        notes.add((what, by))
