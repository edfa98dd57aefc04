"""Tells when Ray takes the node of a process away: after a SIGTERM, or because its cloud or autoscaler wants it back."""

from __future__ import annotations

import time

import ray

from capsfusion_ray.run.ray_private import draining_nodes

ANSWER_S = 10.0
NO_DEADLINE_S = 24 * 3600.0  # for a node that leaves without saying when


class NodeNotice:
    """About the node that this process runs on, as the head knows it. Made in the driver, asked in the actors."""

    def left_s(self) -> float | None:
        """Seconds until the node leaves; None while it stays, and while the head does not answer."""
        try:
            draining = draining_nodes(ANSWER_S)
        except ray.exceptions.RayError:
            return None
        deadline_ms = draining.get(ray.get_runtime_context().get_node_id())
        if deadline_ms is None:
            return None
        return max(deadline_ms / 1000 - time.time(), 0.0) if deadline_ms else NO_DEADLINE_S
