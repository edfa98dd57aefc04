"""Waiting out a store that fails for minutes, for calls that may be repeated whole. Opens no store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from capsfusion_ray.errors import StorageError
from capsfusion_ray.storage.base import StoreFull

log = logging.getLogger(__name__)
T = TypeVar("T")

# After each, the client's own retries (s3.py: about 40 s) begin anew: 12 minutes in all. Then the run stops, and resumes.
PAUSES_S = (5.0, 15.0, 45.0, 135.0, 300.0)


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns; repeated after each of PAUSES_S while it raises StorageError; a full store is not waited for."""
    for pause in PAUSES_S:
        try:
            return call()
        except StoreFull:
            raise
        except StorageError as error:
            log.warning("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
    return call()
