"""A lock that many may hold together or one alone, and that can be closed for good."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReaderWriterLock:
    """`shared` waits while someone holds it `exclusive`; `exclusive` waits until nobody else holds it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._exclusive = self._closed = False

    def close(self, timeout_s: float) -> bool:
        """Let no further `shared` holder in. True once nobody holds the lock, False if that takes longer than `timeout_s`."""
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: not (self._sharing or self._exclusive), max(timeout_s, 0.0))

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not (self._exclusive or self._closed))
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._exclusive)
            self._exclusive = True
            self._changed.wait_for(lambda: not self._sharing)
        try:
            yield
        finally:
            with self._changed:
                self._exclusive = False
                self._changed.notify_all()
