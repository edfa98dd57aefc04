"""A finished output as a folder for the Hugging Face hub and img2dataset: python jobs/export.py output.path=… to=…"""

import sys

from capsfusion_ray.cli import run_job
from capsfusion_ray.dataset.export import ExportConfig, export

if __name__ == "__main__":
    sys.exit(run_job(ExportConfig, export))
