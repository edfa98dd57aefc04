"""Write one self-contained HTML page on an output, finished or running: python jobs/report.py output.path=…"""

import sys

from capsfusion_ray.cli import run_job
from capsfusion_ray.reports.job import ReportConfig, report

if __name__ == "__main__":
    sys.exit(run_job(ReportConfig, report))
