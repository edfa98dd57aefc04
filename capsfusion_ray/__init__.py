"""Fuse the raw and the synthetic caption of every image with a language model, on Ray, and lose no row.

    import capsfusion_ray as cf

    result = cf.fuse(input="captions/*.parquet", output="out/fused", model="my-model")
    captions = cf.Fuser("my-model")(["alt text"], ["A captioner's sentence."])

docs/api.md describes every name. A name is imported when it is first used: `import capsfusion_ray` loads neither Ray nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that has it.
_PLACES = {
    **dict.fromkeys(
        ("fuse", "plan", "verify", "report", "show", "takedown", "export", "evaluate"), "capsfusion_ray.api.functions"
    ),
    **dict.fromkeys(("Fuser", "FusedCaption"), "capsfusion_ray.api.fuser"),
    **dict.fromkeys(
        (
            "FuseResult",
            "PlanResult",
            "VerifyResult",
            "ReportResult",
            "TakedownResult",
            "ExportResult",
            "EvaluateResult",
        ),
        "capsfusion_ray.api.results",
    ),
    **dict.fromkeys(("open_dataset", "Dataset"), "capsfusion_ray.api.dataset"),
    "RowCounts": "capsfusion_ray.core.accounting",
    **dict.fromkeys(("Outcome", "Reason"), "capsfusion_ray.core.types"),
    **dict.fromkeys(
        (
            "CapsFusionError",
            "UsageError",
            "ConfigError",
            "SourceError",
            "PlanChanged",
            "RowError",
            "EngineError",
            "StorageError",
            "ClusterError",
            "LeaseLost",
            "AccountingError",
            "EndpointDown",
            "CostCapReached",
        ),
        "capsfusion_ray.errors",
    ),
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from capsfusion_ray.api.dataset import Dataset as Dataset
    from capsfusion_ray.api.dataset import open_dataset as open_dataset
    from capsfusion_ray.api.functions import evaluate as evaluate
    from capsfusion_ray.api.functions import export as export
    from capsfusion_ray.api.functions import fuse as fuse
    from capsfusion_ray.api.functions import plan as plan
    from capsfusion_ray.api.functions import report as report
    from capsfusion_ray.api.functions import show as show
    from capsfusion_ray.api.functions import takedown as takedown
    from capsfusion_ray.api.functions import verify as verify
    from capsfusion_ray.api.fuser import FusedCaption as FusedCaption
    from capsfusion_ray.api.fuser import Fuser as Fuser
    from capsfusion_ray.api.results import (
        EvaluateResult as EvaluateResult,
    )
    from capsfusion_ray.api.results import (
        ExportResult as ExportResult,
    )
    from capsfusion_ray.api.results import (
        FuseResult as FuseResult,
    )
    from capsfusion_ray.api.results import (
        PlanResult as PlanResult,
    )
    from capsfusion_ray.api.results import (
        ReportResult as ReportResult,
    )
    from capsfusion_ray.api.results import (
        TakedownResult as TakedownResult,
    )
    from capsfusion_ray.api.results import (
        VerifyResult as VerifyResult,
    )
    from capsfusion_ray.core.accounting import RowCounts as RowCounts
    from capsfusion_ray.core.types import Outcome as Outcome
    from capsfusion_ray.core.types import Reason as Reason
    from capsfusion_ray.errors import (
        AccountingError as AccountingError,
    )
    from capsfusion_ray.errors import (
        CapsFusionError as CapsFusionError,
    )
    from capsfusion_ray.errors import (
        ClusterError as ClusterError,
    )
    from capsfusion_ray.errors import (
        ConfigError as ConfigError,
    )
    from capsfusion_ray.errors import (
        CostCapReached as CostCapReached,
    )
    from capsfusion_ray.errors import (
        EndpointDown as EndpointDown,
    )
    from capsfusion_ray.errors import (
        EngineError as EngineError,
    )
    from capsfusion_ray.errors import (
        LeaseLost as LeaseLost,
    )
    from capsfusion_ray.errors import (
        PlanChanged as PlanChanged,
    )
    from capsfusion_ray.errors import (
        RowError as RowError,
    )
    from capsfusion_ray.errors import (
        SourceError as SourceError,
    )
    from capsfusion_ray.errors import (
        StorageError as StorageError,
    )
    from capsfusion_ray.errors import (
        UsageError as UsageError,
    )
