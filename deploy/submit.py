"""Submit one job to a Ray cluster, follow its log, and end with the job's own exit code.

python deploy/submit.py <address> <runtime env file> jobs/fuse.py key=value …    (make submit does it)

It prints and runs one `ray job submit` line, which may as well be typed by hand. The line's own exit code is 1 whatever a
job failed with, and 0 for one that was stopped, so the job's is asked for afterwards: 2 means that the configuration must
change, anything else but 0 that the same command resumes. A driver that a signal ended counts as in a shell: 137 is SIGKILL.

Secrets are refused: the line stands in the cluster's list of jobs, for all who can see it.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from capsfusion_ray.cli import EXIT_USAGE
from capsfusion_ray.config import without_secrets

ROOT = Path(__file__).resolve().parents[1]


def command(address: str, runtime_env: str, submission_id: str, script: list[str]) -> list[str]:
    """The `ray job submit` line. The driver asks for no GPU and no CPU: a head node has neither to give.

    The words are as they are: `ray job submit` itself quotes them for the shell that starts the driver.
    """
    return [
        str(Path(sys.executable).with_name("ray")),
        "job",
        "submit",
        "--address",
        address,
        "--submission-id",
        submission_id,
        "--working-dir",
        str(ROOT),
        "--runtime-env",
        runtime_env,
        "--",
        "python",
        *script,
    ]


def main(address: str, runtime_env: str, *script: str) -> int:
    if not script:
        raise SystemExit("no job given; write: deploy/submit.py <address> <runtime env file> jobs/fuse.py key=value …")
    if hidden := [word for word in without_secrets(script) if word not in script]:
        print(
            f"error: {' '.join(hidden)}: everybody who sees the cluster would read it in its list of jobs; put AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY into the environment of every node, or give the nodes a role",
            file=sys.stderr,
        )
        return EXIT_USAGE
    submission_id = f"{Path(script[0]).stem}-{uuid.uuid4().hex[:8]}"
    line = command(address, runtime_env, submission_id, list(script))
    print(shlex.join(line), file=sys.stderr, flush=True)
    try:
        ended = subprocess.run(line, check=False).returncode
    except KeyboardInterrupt:
        print(
            f"{submission_id} goes on, nobody follows it; to end it: make stop RAY_ADDRESS={address} JOB={submission_id}",
            file=sys.stderr,
        )
        return 128 + signal.SIGINT
    try:
        job = JobSubmissionClient(address).get_job_info(submission_id)
    except (OSError, RuntimeError):  # no such cluster, or it took no job: the line has said why
        return ended or 1
    return exit_code(job.status, job.driver_exit_code)


def exit_code(status: JobStatus, driver_exit_code: int | None) -> int:
    """Ours, for a job as the cluster knows it. Without a code, it was stopped, or never began, or is not followed any more."""
    if status == JobStatus.SUCCEEDED:
        return 0
    if driver_exit_code is None:
        return 1
    return driver_exit_code if driver_exit_code >= 0 else 128 - driver_exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
