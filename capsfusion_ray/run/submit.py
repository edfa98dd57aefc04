"""Submit one job to a Ray cluster, follow its log, and end with the job's own exit code: `capsfusion submit`, `make submit`.

It prints and runs one `ray job submit` line, which can also be typed by hand. That line's own exit code is 1 for every
failed job and 0 for a stopped one. Therefore the cluster is asked for the job's exit code afterwards: 2 means that the
configuration must change; any other code but 0 means that the same command resumes the job. A driver that was ended by a
signal counts as in a shell: 137 is SIGKILL.

Words that hold a secret are refused: everybody who can see the cluster can read the line in its list of jobs.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from capsfusion_ray.config import setting, without_secrets
from capsfusion_ray.errors import ConfigError


@dataclass(frozen=True)
class SubmitConfig:
    """Which cluster, and what its nodes need. The job and its own words follow these keys."""

    address: str = setting("http://127.0.0.1:8265", "URL of the cluster's dashboard", common=True)
    runtime_env: str = setting(
        "deploy/runtime_env.yaml", "a file as `ray job submit --runtime-env` takes it", common=True
    )


def submit(cfg: SubmitConfig, job: Sequence[str]) -> int:
    """Run `job` (its name, then its words) on the cluster; the job's exit code, or 130 after Ctrl-C, which leaves it running.

    Raises ConfigError without a job, for a word that holds a secret, and outside of a checkout, whose files are uploaded.
    """
    if not job:
        raise ConfigError("no job given; write: capsfusion submit [address=…] [runtime_env=…] fuse key=value …")
    if hidden := [word for word in without_secrets(job) if word not in job]:
        raise ConfigError(
            f"{' '.join(hidden)}: everybody who sees the cluster would read it in its list of jobs; put AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY into the environment of every node, or give the nodes a role"
        )
    os.environ.pop("RAY_ADDRESS", None)  # Ray's client would prefer it to `address`
    name, *words = job
    submission_id = f"{name}-{uuid.uuid4().hex[:8]}"
    line = command(cfg, checkout(), submission_id, [f"jobs/{name}.py", *words])
    print(shlex.join(line), file=sys.stderr, flush=True)
    try:
        ended = subprocess.run(line, check=False).returncode
    except KeyboardInterrupt:
        print(
            f"{submission_id} is still running; to end it: make stop RAY_ADDRESS={cfg.address} JOB={submission_id}",
            file=sys.stderr,
        )
        return 128 + signal.SIGINT
    try:
        info = JobSubmissionClient(cfg.address).get_job_info(submission_id)
    except (OSError, RuntimeError):  # no such cluster, or it took no job: `ray job submit` has printed why
        return ended or 1
    return exit_code(info.status, info.driver_exit_code)


def checkout() -> Path:
    """The folder to upload: the checkout that this package is in. Raises ConfigError for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "jobs" / "fuse.py").is_file():
        raise ConfigError(
            f"{root}: no checkout of the project, and submit uploads one (jobs/, capsfusion_ray/, conf/, models/); run make submit or "
            "capsfusion submit in a checkout. Where the cluster's nodes have the package installed, no upload is needed: "
            "ray job submit --address http://head:8265 -- capsfusion fuse key=value …"
        )
    return root


def command(cfg: SubmitConfig, root: Path, submission_id: str, script: Sequence[str]) -> list[str]:
    """The `ray job submit` line. It asks for no GPU and no CPU for the driver: a head node may have neither.

    The words of `script` are not quoted here: `ray job submit` quotes them for the shell that starts the driver.
    """
    return [
        str(Path(sys.executable).with_name("ray")),
        "job",
        "submit",
        "--address",
        cfg.address,
        "--submission-id",
        submission_id,
        "--working-dir",
        str(root),
        "--runtime-env",
        cfg.runtime_env,
        "--",
        "python",
        *script,
    ]


def exit_code(status: JobStatus, driver_exit_code: int | None) -> int:
    """This process's exit code for a job that the cluster reports so. It reports no code for a job that was stopped, did
    not start, or whose log could not be followed to its end.
    """
    if status == JobStatus.SUCCEEDED:
        return 0
    if driver_exit_code is None:
        return 1
    return driver_exit_code if driver_exit_code >= 0 else 128 - driver_exit_code
