"""What a run will take and cost: hours, GPU-hours and dollars, with and without preempted actors. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Upper bound of the share of an actor's life that preemption takes, for estimates. Above it no unit would ever be finished.
MAX_LOST_SHARE = 0.9

# Captions/s of one actor: they size the first units and give the hours of a quote before anything was measured.
# `unit.captions_per_s` and the figures of a finished pilot are better. GPU: LLaMA-2-13B, 3 beams (computed:
# docs/laion-coco.md). CPU: the embedded model on one core.
GUESSED_CAPTIONS_PER_S = {
    ("beam", "cuda"): 90.0,
    ("beam", "cpu"): 10.0,
    ("transformers", "cuda"): 1.5,
    ("transformers", "cpu"): 1.5,
    ("vllm", "cuda"): 150.0,  # without beams; computed, never measured: calibrate=true measures it
    ("vllm", "cpu"): 1.5,
    ("api", "cuda"): 10.0,  # 32 requests in flight of 3 s each
    ("api", "cpu"): 10.0,
    ("echo", "cuda"): 20_000.0,
    ("echo", "cpu"): 20_000.0,
}
# Captions that one engine decodes at the same time where engine.slots is not set: a preempted actor loses all of them.
GUESSED_SLOTS = {("beam", "cuda"): 400, ("beam", "cpu"): 96, ("vllm", "cuda"): 256, ("vllm", "cpu"): 256}
# The last caption of a unit ends this many caption times after the next unit began. Computed: the longest captions have 80
# tokens and the mean caption 41 (80 / 41 = 2 caption times), minus half a caption time, because the captions of a unit end
# later than its prompts enter.
DRAIN = 1.5


@dataclass(frozen=True)
class Estimate:
    """Duration and cost of a run. `captions_per_s` is the speed of one actor."""

    rows: int  # not committed yet
    units: int
    actors: int
    captions_per_s: float
    prompt_tokens: float  # mean per row
    output_tokens: float  # mean per row
    gpus_per_actor: float
    price_per_gpu_hour: float  # USD
    speed_source: str  # says where captions_per_s comes from
    errors: dict[str, str] = field(default_factory=dict)  # path of an unreadable shard -> why
    rows_done: int = 0  # committed in the output already
    preempted_every_h: float | None = None  # mean life of an actor; None: no actor is preempted
    restart_s: float = 0.0  # from an actor's death to the first caption of its successor
    captions_in_flight: float = 0.0  # captions that one actor decodes at the same time

    @property
    def unit_s(self) -> float:
        """Seconds that one actor takes for one unit."""
        return self.rows / self.units / self.captions_per_s if self.units else 0.0

    @property
    def lost_s(self) -> float:
        """Seconds of work that a preemption destroys: half of the current unit on average, and the unit before it while that drains."""
        return self.unit_s / 2 + self.drain_s

    @property
    def drain_s(self) -> float:
        """Seconds from the start of a unit's last caption, when the next unit begins, to the end of that caption."""
        return DRAIN * self.captions_in_flight / self.captions_per_s

    @property
    def seconds(self) -> float:
        """Time from the first caption to the last.

        It is the work and the waiting of all actors, and a tail in which some actors have no unit left.
        tests/core/test_cost_model.py checks it against simulated pools.
        """
        if not self.rows:
            return 0.0
        gone_s = self.lost_s + self.restart_s
        # The probability that an actor dies during the last units: these wait for its successor, which fuses them from the start.
        late = 1 - math.exp(-self.actors * gone_s / (self.preempted_every_h * 3600)) if self.preempted_every_h else 0.0
        # The last units of all actors end at random times within the time of one unit. A single actor waits for no other.
        tail = self.drain_s + (1 - 1 / self.actors) * (
            0.5 * self.unit_s + late * (0.6 * self.unit_s + self.drain_s + self.restart_s)
        )
        return self.rows / (self.captions_per_s * self.actors) / (1 - self._lost_share(gone_s)) + tail

    def _lost_share(self, seconds: float) -> float:
        """The share of an actor's life that is lost if each preemption costs `seconds`, at most MAX_LOST_SHARE."""
        return min(seconds / (self.preempted_every_h * 3600), MAX_LOST_SHARE) if self.preempted_every_h else 0.0

    @property
    def gpu_hours(self) -> float:
        """Hours in which the engines fuse, including work that preemption destroys, without the start of nodes and models and without waiting."""
        return self.rows / self.captions_per_s / (1 - self._lost_share(self.lost_s)) / 3600 * self.gpus_per_actor

    @property
    def price(self) -> float:
        """USD."""
        return self.gpu_hours * self.price_per_gpu_hour

    @property
    def captions_per_gpu_hour(self) -> float | None:
        """None on CPUs."""
        return round(self.captions_per_s * 3600 / self.gpus_per_actor, 1) if self.gpus_per_actor else None

    def text(self) -> str:
        """The estimate as lines for people."""
        done = f"; {self.rows_done:,} are done already" if self.rows_done else ""
        if not self.rows and done:
            return f"nothing is left to do: all {self.rows_done:,} planned rows are done"
        lines = [
            f"rows            {self.rows:,} in {self.units:,} units{done}",
            f"tokens per row  {self.prompt_tokens:.0f} prompt, {self.output_tokens:.0f} output (sampled)",
            f"actors          {self.actors} with {self.gpus_per_actor:g} GPU each, {self.captions_per_s:g} captions/s each ({self.speed_source})",
            f"time            {_duration(self.seconds)} from the first caption to the last",
            f"GPU-hours       {self.gpu_hours:,.1f}, {self.price:,.2f} USD at {self.price_per_gpu_hour:g} per hour"
            if self.gpus_per_actor
            else "GPU-hours       none: runs on CPUs (set cluster.gpus_per_actor=1 for the estimate of a GPU)",
        ]
        if self.preempted_every_h:
            deaths = self.seconds * self.actors / (self.preempted_every_h * 3600)
            lost = f"each costs a restart of {self.restart_s:g} s and {self.lost_s:.0f} s of work"
            lines.append(f"preempted       {deaths:,.0f} times (an actor lives {self.preempted_every_h:g} h); {lost}")
        lines += [f"unreadable      {path}: {error}" for path, error in self.errors.items()]
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:,.0f} minutes"
    return f"{seconds / 3600:,.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"
