"""The exceptions, and who may retry what. Knows nothing else.

    CapsFusionError
    ├── UsageError            the user must change something; never retried; exit code 2
    │   ├── ConfigError       a key or a value of the configuration
    │   ├── SourceError       an input: a path, a column, a format
    │   └── PlanChanged       the output holds another plan than the configuration gives
    ├── RowError              one row cannot be fused; it becomes that row's reject, never retried
    ├── EngineError           the engine is unusable; its process ends, the unit is retried elsewhere
    ├── StorageError          the store failed after the client's own retries; waited out for minutes
    ├── ClusterError          no Ray cluster to run on; the same command again
    ├── LeaseLost             another driver took this output over; this driver stops, nothing is lost
    ├── EndpointDown          an API gave no good answer for long; the run stops, the same command goes on
    ├── CostCapReached        the money given for an API is spent; a higher cap goes on
    └── AccountingError       rows lost or doubled: a bug or damage; the run stops, never retried

Every class takes one message argument, so that it survives pickling between Ray processes. A message names the
thing, the value and the way out.
"""


class CapsFusionError(Exception):
    """Root of all errors that this package raises on purpose."""


class UsageError(CapsFusionError):
    """The user must change something; a retry would fail the same way. Exit code 2."""


class ConfigError(UsageError):
    """An unknown key, a bad value or a contradiction in the configuration."""


class SourceError(UsageError):
    """An input path, format or column that cannot be read as caption pairs."""


class PlanChanged(UsageError):
    """The output already holds a plan with another base fingerprint."""


class RowError(CapsFusionError):
    """This row alone cannot be fused (a prompt no truncation fits, NaN scores)."""


class EngineError(CapsFusionError):
    """The engine cannot go on; its process must end so that Ray starts a fresh one."""


class StorageError(CapsFusionError):
    """The object store did not do what was asked, after the client's own retries."""


class ClusterError(CapsFusionError):
    """Ray could not be started or joined."""


class LeaseLost(CapsFusionError):
    """Another driver holds the lease of this output."""


class AccountingError(CapsFusionError):
    """planned != fused + kept + rejected + filtered + removed + unreadable."""


class EndpointDown(CapsFusionError):
    """An API gave no good answer for engine.api.gone_s. No row and no process is at fault: the run ends with it."""


class CostCapReached(CapsFusionError):
    """As much as engine.api.max_dollars allows is spent; what is committed is kept, and a higher cap goes on."""
