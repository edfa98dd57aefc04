"""Wait for a store that fails for minutes, and repeat the call. Opens no store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from capsfusion_ray.errors import StorageError
from capsfusion_ray.storage.base import StoreFull

log = logging.getLogger(__name__)
T = TypeVar("T")

# After each pause the client's own retries (s3.py: about 40 s) begin again: 12 minutes in all. Then the run stops.
PAUSES_S = (5.0, 15.0, 45.0, 135.0, 300.0)


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns. While it raises StorageError it is repeated, after each of PAUSES_S; StoreFull is raised at once.

    `call` must be repeatable as a whole.
    """
    for pause in PAUSES_S:
        try:
            return call()
        except StoreFull:
            raise
        except StorageError as error:
            log.warning("%s; it is repeated in %.0f s", error, pause)
            time.sleep(pause)
    return call()
