"""`ray start` with `patient_start` of capsfusion_ray.run.private_cluster: python tests/support/ray_start.py --head --block …"""

from __future__ import annotations

import sys

from ray.scripts.scripts import start

from capsfusion_ray.run.private_cluster import patient_start

if __name__ == "__main__":
    with patient_start():
        start(sys.argv[1:])
