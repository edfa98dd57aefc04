"""All exceptions of the package. The class of an error says who may retry.

    CapsFusionError
    ├── UsageError            the user must change something; never retried; exit code 2
    │   ├── ConfigError       a key or a value of the configuration
    │   ├── SourceError       the input: a path, a column, a format
    │   └── PlanChanged       the output was begun with other settings or another input
    ├── RowError              one row cannot be fused; it is rejected with this error, and never retried
    ├── EngineError           the engine cannot continue; its process ends, and another actor retries the unit
    ├── StorageError          the store failed after the retries of its client; the job waits some minutes and retries
    ├── ClusterError          Ray could not be started or joined; run the same command again
    ├── LeaseLost             another driver took this output over; this driver stops, and nothing is lost
    ├── EndpointDown          an API gave no good answer for a long time; the run stops, and the same command continues it
    ├── CostCapReached        the money allowed for an API is spent; the same command with a higher cap continues
    └── AccountingError       rows are lost or doubled by a bug or damage; the run stops, and nothing is retried

Every class takes one argument, the message, so that it can be pickled between Ray processes. A message names the thing, the
value and the way out.
"""


class CapsFusionError(Exception):
    """Base class of all errors that this package raises on purpose."""


class UsageError(CapsFusionError):
    """The user must change something, because a retry would fail in the same way. Exit code 2."""


class ConfigError(UsageError):
    """An unknown key, a bad value or a contradiction in the configuration."""


class SourceError(UsageError):
    """An input path, format or column that cannot be read as caption pairs."""


class PlanChanged(UsageError):
    """The output has a plan with another base fingerprint."""


class RowError(CapsFusionError):
    """One row cannot be fused (its prompt does not fit even when cut, its scores are NaN)."""


class EngineError(CapsFusionError):
    """The engine cannot continue. Its process must end, so that Ray starts a new one."""


class StorageError(CapsFusionError):
    """The object store did not do what was asked, also after the retries of its client."""


class ClusterError(CapsFusionError):
    """Ray could not be started or joined."""


class LeaseLost(CapsFusionError):
    """Another driver holds the lease of this output."""


class AccountingError(CapsFusionError):
    """planned != fused + kept + rejected + filtered + removed + unreadable."""


class EndpointDown(CapsFusionError):
    """An API gave no good answer for engine.api.gone_s. The run ends, because another row or another process would not change it."""


class CostCapReached(CapsFusionError):
    """The run has spent engine.api.max_dollars. Committed units are kept; the same command with a higher cap continues."""
