"""What every job does at its door: argv -> typed config -> one call -> a JSON line and an exit code.

Exit codes: 0 done, 2 the configuration or the input must change, 1 failed (the same command again resumes).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO, TypeVar

from capsfusion_ray.config import OutputConfig, load, usage
from capsfusion_ray.errors import CapsFusionError, UsageError
from capsfusion_ray.reports.job import ReportConfig, report

T = TypeVar("T")
EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment: the live bar puts itself there, and lines go above it instead of into it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """StreamHandler sets it when it is made."""


def helped(schema: type, argv: Sequence[str]) -> bool:
    """Print what the job is and its keys where --help asks for them; whether it did."""
    if asked := bool({"-h", "--help"} & set(argv)):
        print(f"{(sys.modules['__main__'].__doc__ or '').strip()}\n\n{usage(schema)}")
    return asked


def run_job(schema: type[T], call: Callable[[T], dict[str, Any]], argv: list[str] | None = None) -> int:
    """Logs go to stderr; the last line on stdout is the call's result as one JSON object. --help: the job's keys."""
    logging.basicConfig(
        level=os.environ.get("LOG_LEVEL", "INFO"),
        handlers=[_Stderr()],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for noisy in ("botocore", "aiobotocore", "s3fs", "urllib3", "httpx", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    argv = sys.argv[1:] if argv is None else argv
    if helped(schema, argv):
        return EXIT_DONE
    try:
        result = call(load(schema, argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except CapsFusionError as error:
        logging.getLogger(__name__).debug("where it was raised", exc_info=True)
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; everything committed is kept, the same command again resumes", file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(result, ensure_ascii=False), flush=True)
    return EXIT_DONE


def with_page(result: dict[str, Any], output: OutputConfig, price_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """Write the page on the output of a job that is done. A page that fails does not make the job fail: it is logged."""
    try:
        page = report(ReportConfig(output, price_per_gpu_hour=price_per_gpu_hour))
    except Exception:
        again = f"python jobs/report.py output.path={output.path}"
        logging.getLogger(__name__).exception("the job is done, its report is not: %s", again)
        return result
    return result | {"report": page["report"]}
