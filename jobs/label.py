"""Label caption pairs with a teacher: python jobs/label.py input.path=… output.path=… engine.api.url=… engine.api.model=…"""

import sys
from typing import Any

from capsfusion_ray.cli import run_job
from capsfusion_ray.run.driver import fuse
from capsfusion_ray.training.label import LabelConfig, prepare, train_command


def label(cfg: LabelConfig) -> dict[str, Any]:
    return fuse(prepare(cfg)) | {"train": train_command(cfg)}


if __name__ == "__main__":
    sys.exit(run_job(LabelConfig, label))
