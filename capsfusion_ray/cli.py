"""The command `capsfusion <job> [conf.yaml …] key=value …`. `python -m capsfusion_ray` and the files of jobs/ run the same jobs.

A job's module is imported when the job is chosen: `--help` and `--version` load neither Ray nor torch.

Exit codes: 0 the job is done, 2 the configuration or the input must change, 1 the job failed (the same command resumes it).
"""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from capsfusion_ray.errors import CapsFusionError, UsageError

T = TypeVar("T")
EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


@dataclass(frozen=True)
class Job:
    """One line of JOBS. `call` and `config` are lazy paths, `module:name`; `call` takes what `config` describes."""

    does: str
    words: str  # an example of its words, for --help
    call: str
    config: str


JOBS = {
    "fuse": Job(
        "fuse caption shards into a partitioned dataset; the same command resumes a run",
        "[conf.yaml …] input.path=… output.path=…",
        "capsfusion_ray.api.jobs:fuse",
        "capsfusion_ray.config:FuseConfig",
    ),
    "plan": Job(
        "print what a fuse run would do, take and cost; write nothing",
        "[conf.yaml …] input.path=… output.path=…",
        "capsfusion_ray.api.jobs:plan",
        "capsfusion_ray.config:PlanConfig",
    ),
    "pair": Job(
        "join raw and synthetic captions of two tables, by URL, hash or key",
        "raw.path=… synthetic.path=… output.path=… [normalise=url]",
        "capsfusion_ray.pairing.job:pair",
        "capsfusion_ray.pairing.config:PairConfig",
    ),
    "label": Job(
        "let a teacher model behind an API write the captions to train on",
        "input.path=… output.path=… engine.api.url=… engine.api.model=…",
        "capsfusion_ray.api.jobs:label",
        "capsfusion_ray.training.label:LabelConfig",
    ),
    "train": Job(
        "train a fusion model on caption triples",
        "conf/train/….yaml data.path=… output.path=…",
        "capsfusion_ray.training.job:train",
        "capsfusion_ray.training.config:TrainConfig",
    ),
    "average": Job(
        "average the weights of models that were trained from one start",
        "models=[a,b] shares=[0.7,0.3] output.path=…",
        "capsfusion_ray.training.average:average",
        "capsfusion_ray.training.average:AverageConfig",
    ),
    "evaluate": Job(
        "compare a model or an output with reference captions and baselines",
        "data.path=… [engine.model=… | fused=…]",
        "capsfusion_ray.training.evaluate:evaluate",
        "capsfusion_ray.training.evaluate:EvaluateConfig",
    ),
    "verify": Job(
        "prove that every planned row of a finished output is accounted for",
        "output.path=… [deep=true]",
        "capsfusion_ray.dataset.verify:verify",
        "capsfusion_ray.config:VerifyConfig",
    ),
    "report": Job(
        "write one HTML page about an output, finished or running",
        "output.path=… [beside.path=…]",
        "capsfusion_ray.reports.job:report",
        "capsfusion_ray.reports.job:ReportConfig",
    ),
    "show": Job(
        "show captions of a finished output in the terminal",
        "output.path=… [count=8]",
        "capsfusion_ray.api.jobs:show",
        "capsfusion_ray.reports.terminal:ShowConfig",
    ),
    "export": Job(
        "copy a finished output into a folder for the Hugging Face hub and img2dataset",
        "output.path=… to=…",
        "capsfusion_ray.dataset.export:export",
        "capsfusion_ray.dataset.export:ExportConfig",
    ),
    "takedown": Job(
        "remove rows from a finished output",
        "output.path=… urls=<file> | row_ids=<file> | above={punsafe: 0.3}",
        "capsfusion_ray.api.jobs:takedown",
        "capsfusion_ray.dataset.takedown_criteria:TakedownConfig",
    ),
    "submit": Job(
        "run one of these jobs on a Ray cluster, through its dashboard",
        "[address=http://head:8265] [runtime_env=….yaml] fuse [conf.yaml …] key=value …",
        "capsfusion_ray.run.submit:submit",
        "capsfusion_ray.run.submit:SubmitConfig",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; the exit code. `argv`: the job's name and its words; None: those of this process."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return EXIT_DONE
    if name == "--version":
        print(f"capsfusion-ray {sys.modules['capsfusion_ray'].__version__}")
        return EXIT_DONE
    if name not in JOBS:
        near = difflib.get_close_matches(name, JOBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(JOBS)}"
        print(f"error: {name}: no such job; {hint}", file=sys.stderr)
        return EXIT_USAGE
    job = JOBS[name]
    try:
        schema = _named(job.config)
    except UsageError as error:  # a package that only this job needs is not installed
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE

    def call(*given: Any) -> Any:
        return _named(job.call)(*given)  # imported here: --help needs no optional package

    if name == "submit":
        at = next((i for i, word in enumerate(words) if word in JOBS), len(words))
        words, submitted = words[:at], words[at:]
        if {"-h", "--help"} & set(submitted):
            return main(submitted)
        return run_job(schema, lambda cfg: call(cfg, submitted), words, f"capsfusion submit {job.words}\n\n{job.does}")
    return run_job(schema, call, words, f"capsfusion {name} {job.words}\n\n{job.does}")


def _named(path: str) -> Any:
    """What a lazy path `module:name` stands for."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _overview() -> str:
    lines = [f"  {name:9} {job.does}" for name, job in JOBS.items()]
    return "\n".join(
        [
            "capsfusion <job> [conf.yaml …] key=value …",
            "",
            "Fuse the raw and the synthetic caption of every image with a language model, on Ray, and lose no row.",
            "",
            *lines,
            "",
            "capsfusion <job> --help lists the keys of a job, capsfusion --version the version.",
            "YAML files are merged left to right, then the key=value words. A file conf/… that is not in the current folder",
            "is taken from the installed package: conf/demo.yaml, conf/source/….yaml, conf/gates/….yaml, conf/train/….yaml.",
        ]
    )


# ------------------------------------------------------------------------------------------------------------- one job


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment: the progress bar replaces sys.stderr, and log lines go above the bar."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """StreamHandler sets it when it is made."""


def run_job(schema: type[T], call: Callable[[T], Any], argv: Sequence[str], about: str = "") -> int:
    """Parse `argv` as `schema`, call the job, and print its result; the exit code.

    Logs go to stderr. A result that is a dict is printed on stdout as one line of JSON, the last one, after lines for people
    where stdout is a terminal; an int is the exit code; None means that the job has printed what it found. --help prints
    `about` and the keys instead.
    """
    from capsfusion_ray.config import parse_config, usage

    if {"-h", "--help"} & set(argv):
        print(f"{about}\n\n{usage(schema)}".strip())
        return EXIT_DONE
    _log_to_stderr()
    try:
        with _sigterm_interrupts():
            result = call(parse_config(schema, argv))
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
    if isinstance(result, int):
        return result
    if result is not None:
        if sys.stdout.isatty():
            print("\n".join(_summary(result)))
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return EXIT_DONE


def _summary(result: dict[str, Any]) -> Iterator[str]:
    """A result in lines for people: counts without zeros, and nothing of what has no value."""
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items() if inner)
        if value not in (None, "", []):
            yield f"{key.replace('_', ' '):16} {_shown(value)}"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _log_to_stderr() -> None:
    """Configure logging for the process of a command; the Python API leaves it as the caller has it."""
    logging.basicConfig(
        level=os.environ.get("LOG_LEVEL", "INFO"),
        handlers=[_Stderr()],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for noisy in ("botocore", "aiobotocore", "s3fs", "urllib3", "httpx", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the job as Ctrl-C does: committed units are kept, actors and a local cluster are shut down."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
