"""The functions of `import capsfusion_ray as cf`: the jobs of the command with keyword arguments and typed results.

A keyword argument is a short name for one key of docs/configuration.md. `config` sets every other key: a mapping with dotted
or nested keys, the path of a YAML file, a word `key=value`, or a list of these, merged left to right. Keyword arguments win.

The functions raise the errors of `capsfusion_ray.errors`, never SystemExit. They set no signal handler and leave the
logging of the process as it is. Each one imports what it needs when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from capsfusion_ray.api import jobs
from capsfusion_ray.api.results import (
    EvaluateResult,
    ExportResult,
    FuseResult,
    PlanResult,
    ReportResult,
    TakedownResult,
    VerifyResult,
)
from capsfusion_ray.api.settings import Config, Place, parsed
from capsfusion_ray.config import FuseConfig, PlanConfig, VerifyConfig
from capsfusion_ray.core.accounting import RowCounts


def fuse(
    input: Place | Sequence[Place] | None = None,
    output: Place | None = None,
    *,
    model: Place | None = None,
    preset: str | None = None,
    passthrough: Sequence[str] | None = None,
    limit: int | None = None,
    engine: str | None = None,
    num_beams: int | None = None,
    retry: str | None = None,
    local: bool = False,
    config: Config = None,
) -> FuseResult:
    """Fuse caption shards into a partitioned dataset. A call with the same arguments resumes or extends it.

    Args:
        input: files, globs, folders or URLs of caption shards (input.path).
        output: a folder or URL for the dataset (output.path).
        model: a model folder, its URL or a hub id (engine.model). Without one the embedded demo model writes.
        preset: how the columns of the input are named (source.preset): generic, example_json, capsfusion_120m, laion_coco.
        passthrough: input columns to carry along (source.passthrough).
        limit: fuse that many rows, spread over all shards (input.limit).
        engine: beam, transformers, vllm, api or echo (engine.kind).
        num_beams: beams of the search, 1 to 8 (decode.num_beams).
        retry: fuse rejected rows again: "rejected", or reasons separated by commas.
        local: fuse in this process, without Ray (cluster.kind=local): for some hundred rows in a notebook.
        config: every other key; see docs/api.md.

    Raises:
        ConfigError, SourceError, PlanChanged: an argument, the input or the output must change.
        CapsFusionError: the run failed; the same call resumes it.
    """
    given = _of_run(input, output, model, preset, limit, engine, num_beams, local)
    given |= {"source.passthrough": passthrough, "retry": retry}
    done = jobs.fuse(parsed(FuseConfig, config, given))
    return FuseResult(**done | {"rows": RowCounts(**done["rows"])})


def plan(
    input: Place | Sequence[Place] | None = None,
    output: Place | None = None,
    *,
    model: Place | None = None,
    preset: str | None = None,
    limit: int | None = None,
    engine: str | None = None,
    num_beams: int | None = None,
    calibrate: bool = False,
    local: bool = False,
    config: Config = None,
) -> PlanResult:
    """What `fuse` with the same arguments would do, take and cost. Writes nothing.

    Args:
        calibrate: measure one actor on a few hundred rows of the input, instead of guessing its speed.
        The others: as those of `fuse`.

    Raises: ConfigError, SourceError, PlanChanged.
    """
    from capsfusion_ray.run.quote import estimate

    given = _of_run(input, output, model, preset, limit, engine, num_beams, local)
    given |= {"calibrate": calibrate or None}
    quote = estimate(parsed(PlanConfig, config, given))
    return PlanResult(**{name: quote[name] for name in PlanResult.__dataclass_fields__})


def verify(output: Place | None = None, *, deep: bool = False, config: Config = None) -> VerifyResult:
    """Prove that every planned row of a finished output is accounted for.

    Args:
        output: the folder or URL of the output.
        deep: read every row id back, too: each must be in its unit, in order, once.
        config: other keys, such as output.storage.

    Raises:
        ConfigError: there is no finished output.
        AccountingError: rows are missing, damaged or double; the message names up to 50 problems.
    """
    from capsfusion_ray.dataset import verify as proof

    done = proof.verify(parsed(VerifyConfig, config, {"output.path": output, "deep": deep or None}))
    done.pop("verified")
    return VerifyResult(**done | {"rows": RowCounts(**done["rows"])})


def report(output: Place | None = None, *, beside: Place | None = None, config: Config = None) -> ReportResult:
    """Write one HTML page about an output, finished or running.

    Args:
        output: the folder or URL of the output; report.html is written there.
        beside: another output of the same rows to compare with; comparison.html is written instead.
        config: other keys, such as rows_per_reason.

    Raises: ConfigError where there is no output, or the two have no row in common.
    """
    from capsfusion_ray.reports.job import ReportConfig
    from capsfusion_ray.reports.job import report as write

    done = write(parsed(ReportConfig, config, {"output.path": output, "beside.path": beside}))
    return ReportResult(path=done.pop("report"), **done | {"rows": RowCounts(**done["rows"])})


def show(output: Place | None = None, count: int = 8, *, stream: IO[str] | None = None, config: Config = None) -> None:
    """Print `count` fused captions of a finished output, a few rejects and the row counts.

    Args:
        stream: where to print; sys.stdout by default.

    Raises: ConfigError, or SourceError where there is no finished output.
    """
    from capsfusion_ray.reports import terminal

    cfg = parsed(terminal.ShowConfig, config, {"output.path": output, "count": count})
    terminal.show(cfg.output.path, cfg.count, stream or sys.stdout, cfg.output.storage)


def takedown(
    output: Place | None = None,
    *,
    urls: Place | None = None,
    row_ids: Place | None = None,
    above: Mapping[str, float] | None = None,
    below: Mapping[str, float] | None = None,
    config: Config = None,
) -> TakedownResult:
    """Remove rows from a finished output. A row is removed if any of the criteria holds for it.

    Args:
        output: the folder or URL of the output.
        urls, row_ids: a text file, plain or .gz, with one URL or row id per line.
        above, below: a carried-along column -> remove rows with a larger (smaller) value.
        config: other keys, such as filter.max_punsafe.

    Raises: ConfigError where there is no finished output or no criterion; LeaseLost where another process works on it.
    """
    from capsfusion_ray.dataset.takedown_criteria import TakedownConfig

    given = {"output.path": output, "urls": urls, "row_ids": row_ids, "above": above, "below": below}
    return TakedownResult(**jobs.takedown(parsed(TakedownConfig, config, given)))


def export(
    output: Place | None = None,
    to: Place | None = None,
    *,
    title: str | None = None,
    license: str | None = None,
    config: Config = None,
) -> ExportResult:
    """Copy a finished output into a folder for the Hugging Face hub, with a dataset card and an img2dataset command.

    Args:
        output: the folder or URL of the output.
        to: a new or empty folder, or a URL.
        title: of the dataset card.
        license: of the captions, as the hub spells it.

    Raises: ConfigError where there is no finished output, or `to` holds other files.
    """
    from capsfusion_ray.dataset import export as copy

    given = {"output.path": output, "to": to, "title": title, "license": license}
    done = copy.export(parsed(copy.ExportConfig, config, given))
    return ExportResult(rows=done.pop("exported"), **done)


def evaluate(
    data: Place | None = None,
    *,
    model: Place | None = None,
    fused: Place | None = None,
    rows: int | None = None,
    config: Config = None,
) -> EvaluateResult:
    """Compare a model, or the captions of an output, with reference captions and with baselines.

    Args:
        data: a JSON, JSON lines or Parquet file of captions with references, a folder, or an output (data.path).
        model: the model that writes captions for the rows (engine.model).
        fused: instead of a model, the folder of an output whose captions are measured.
        rows: how many of the last rows are measured (data.rows).

    Raises: ConfigError or SourceError for data without such rows.
    """
    from capsfusion_ray.training import evaluate as figures

    given = {"data.path": data, "engine.model": model, "fused": fused, "data.rows": rows}
    return EvaluateResult(**figures.evaluate(parsed(figures.EvaluateConfig, config, given)))


def _of_run(
    input: Place | Sequence[Place] | None,
    output: Place | None,
    model: Place | None,
    preset: str | None,
    limit: int | None,
    engine: str | None,
    num_beams: int | None,
    local: bool,
) -> dict[str, Any]:
    """The keys of the arguments that `fuse` and `plan` share."""
    return {
        "input.path": input,
        "output.path": output,
        "engine.model": model,
        "source.preset": preset,
        "input.limit": limit,
        "engine.kind": engine,
        "decode.num_beams": num_beams,
        "cluster.kind": "local" if local else None,
    }
