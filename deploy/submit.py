"""Submit one job to a Ray cluster, follow its log, and end with the job's own exit code.

python deploy/submit.py <address> <runtime env file> jobs/fuse.py key=value …    (make submit does it)

It prints and runs one `ray job submit` line, which may as well be typed by hand. The line's own exit code is 1 whatever
the job ended with, so the job's is asked for afterwards: 2 means that the configuration must change, 1 that the same
command resumes.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import uuid
from pathlib import Path

from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).resolve().parents[1]


def command(address: str, runtime_env: str, submission_id: str, script: list[str]) -> list[str]:
    """The `ray job submit` line. The driver asks for no GPU and no CPU: a head node has neither to give."""
    return [
        str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address, "--submission-id", submission_id,
        "--working-dir", str(ROOT), "--runtime-env", runtime_env,
        "--", "python", *(shlex.quote(part) for part in script),
    ]  # fmt: skip


def main(address: str, runtime_env: str, *script: str) -> int:
    if not script:
        raise SystemExit("no job given; write: deploy/submit.py <address> <runtime env file> jobs/fuse.py key=value …")
    submission_id = f"{Path(script[0]).stem}-{uuid.uuid4().hex[:8]}"
    line = command(address, runtime_env, submission_id, list(script))
    print(shlex.join(line), file=sys.stderr, flush=True)
    ended = subprocess.run(line, check=False).returncode
    if ended == 0:
        return 0
    code = JobSubmissionClient(address).get_job_info(submission_id).driver_exit_code
    return ended if code is None else code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
