"""What the functions of the API return: frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field

from capsfusion_ray.core.accounting import RowCounts


@dataclass(frozen=True)
class FuseResult:
    """A finished output. `rows.planned == rows.done`: fuse raises AccountingError otherwise."""

    output: str  # the folder or URL
    rows: RowCounts
    rejects: dict[str, int]  # reason -> rejected rows
    filtered: dict[str, int]  # filter -> rows left out
    flags: dict[str, int]  # flag -> rows of data/ that carry it
    units: int
    resumed_units: int  # units that were committed before this call
    seconds: float
    captions_per_s: float  # rows that this call fused, per second
    report: str | None = None  # path or URL of report.html; None: it could not be written, and the log says why


@dataclass(frozen=True)
class PlanResult:
    """What a fuse run would do, take and cost. `text` says it in lines for people."""

    rows: int  # rows to fuse
    rows_done: int  # rows that the output holds already
    units: int
    unit_rows: int
    shards: int
    actors: int
    gpus_per_actor: float
    captions_per_s: float  # of one actor
    speed_source: str  # where captions_per_s comes from
    prompt_tokens: float  # mean per row
    output_tokens: float  # mean per row
    seconds: float  # from the first caption to the last
    gpu_hours: float
    price_usd: float
    errors: dict[str, str]  # unreadable shard -> what is wrong
    fingerprint: str
    text: str = field(repr=False)


@dataclass(frozen=True)
class VerifyResult:
    """An output in which every planned row is accounted for."""

    output: str
    deep: bool
    rows: RowCounts
    files: int
    bytes: int
    units: int


@dataclass(frozen=True)
class ReportResult:
    """A page that was written. `rows` counts what is committed so far where the output is not finished."""

    path: str  # of report.html or comparison.html: a path or a URL
    finished: bool
    rows: RowCounts
    sampled: int  # captions on the page
    bytes: int
    seconds: float


@dataclass(frozen=True)
class TakedownResult:
    """Rows that were removed from an output."""

    output: str
    removed: int
    not_found: int | None  # listed URLs and row ids that the output does not have; None for a takedown that was resumed
    groups_rewritten: int
    files_deleted: int
    seconds: float
    report: str | None = None


@dataclass(frozen=True)
class ExportResult:
    """A folder for the Hugging Face hub and img2dataset."""

    to: str
    rows: int
    files: int
    seconds: float


@dataclass(frozen=True)
class EvaluateResult:
    """Figures of a model or an output, beside those of the baselines. `figures`: system -> figure -> value."""

    rows: int
    measured: str  # the model or the output
    system: str  # its name in `figures`: model or output
    figures: dict[str, dict[str, float]]
