"""Whether the node of a process will be taken away: Ray marks one that got SIGTERM, or that its cloud or autoscaler wants back."""

from __future__ import annotations

import time

import ray
from ray._private.worker import global_worker

ANSWER_S = 10.0
FAR_S = 24 * 3600.0  # a node that goes without saying when


class NodeNotice:
    """Of the node that this process runs on, as the head knows it. Made in the driver, asked in the workers."""

    def left_s(self) -> float | None:
        """Seconds from now; None while it stays, or while the head does not answer."""
        try:
            draining = global_worker.gcs_client.get_draining_nodes(timeout=ANSWER_S)
        except ray.exceptions.RayError:
            return None
        deadline_ms = draining.get(ray.get_runtime_context().get_node_id())
        if deadline_ms is None:
            return None
        return max(deadline_ms / 1000 - time.time(), 0.0) if deadline_ms else FAR_S
