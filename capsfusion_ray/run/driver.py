"""One fuse run: survey the input, plan, fuse the pending units while finished groups are compacted, publish the manifest.

Talks to a Ray cluster or to this process through an Executor alone.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from capsfusion_ray.config import FuseConfig, to_yaml
from capsfusion_ray.core.accounting import Counts
from capsfusion_ray.core.plan import Plan, refuse_lost_input
from capsfusion_ray.dataset.edit_record import refuse_unfinished_edit
from capsfusion_ray.dataset.editions import clean
from capsfusion_ray.dataset.layout import RUN_DIR, config_path
from capsfusion_ray.dataset.lease import Lease
from capsfusion_ray.dataset.manifest import GroupEntry, Manifest, assemble, read_groups, read_manifest, swap_manifest
from capsfusion_ray.dataset.mark_repeated import judge_repeats
from capsfusion_ray.dataset.plan_files import read_plans, write_plan
from capsfusion_ray.dataset.rewriter import Rewriter
from capsfusion_ray.dataset.unit_files import committed, read_summaries
from capsfusion_ray.errors import AccountingError, ConfigError
from capsfusion_ray.models.inspect import resolve_with_model
from capsfusion_ray.run.compactor import Compactor
from capsfusion_ray.run.cost import cost
from capsfusion_ray.run.edits.base import Edit, run_edit
from capsfusion_ray.run.edits.repair_files import open_repair
from capsfusion_ray.run.edits.retry_rejected import open_retry, reasons_of
from capsfusion_ray.run.executors.base import Executor, open_executor
from capsfusion_ray.run.pool import Pool
from capsfusion_ray.run.progress import Progress
from capsfusion_ray.run.stages import Job, shard_reads
from capsfusion_ray.run.survey import OutputState, Survey, base_of, next_plan, read_spec, survey
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)


def fuse(cfg: FuseConfig, executor: Executor | None = None) -> dict[str, Any]:
    """Do what the config asks for: a run, a retry or a repair. Returns the last line that the command prints, as a dict.

    `executor` runs the stages and is closed at the end; None: the one of cluster.kind. Raises CapsFusionError, and
    KeyboardInterrupt after Ctrl-C: committed units are kept, and the same command resumes.
    """
    began = time.monotonic()
    found = survey(cfg)
    if cfg.retry:
        reasons_of(cfg.retry)  # raises for a wrong name, before any cluster is started
    store = Store(cfg.output.path, cfg.output.storage)
    store.check_writable(RUN_DIR)
    if not store.conditional_put:
        log.warning(
            "%s: this store has no conditional writes; never let two drivers work on one output", cfg.output.path
        )
    with (
        Lease(store, cfg.takeover, cfg.lease_wait_s) as lease,
        closing(executor or open_executor(cfg.cluster)) as executor,
    ):
        run = _resolved(cfg, found, store, lease, executor)
        return run.edit(began) if cfg.retry or cfg.repair else run.fuse(began)


def _resolved(cfg: FuseConfig, found: Survey, store: Store, lease: Lease, executor: Executor) -> _Run:
    """The run, with every setting resolved that depends on the model or on the machines."""
    engine, decode = resolve_with_model(cfg.engine, cfg.decode, found.model)
    pool = executor.resolve_pool(engine, units=sys.maxsize)
    engine = executor.resolve_engine(engine, pool)
    return _Run(dataclasses.replace(cfg, engine=engine, decode=decode), found, store, lease, executor, pool)


@dataclass(frozen=True)
class _Run:
    """One command on one output; this process holds its lease. `cfg` is resolved; `pool` is for any number of units."""

    cfg: FuseConfig
    found: Survey
    store: Store
    lease: Lease
    executor: Executor
    pool: Pool

    # ------------------------------------------------------------------------------------------------- retry and repair

    def edit(self, began: float) -> dict[str, Any]:
        """Do the retry or the repair that is asked for."""
        plans = read_plans(self.store)
        edit = self._open_edit(plans)
        units = sum(len(plan.units) for plan in plans)
        if edit:
            counts = run_edit(edit, self._job(plans[0].fields), self.executor, self.pool, self.lease)
            again, rows = len(edit.units), edit.rows
        else:
            done = "this very retry is done" if self.cfg.retry else "every file is as the manifest says"
            log.info("nothing is left to do: %s", done)
            manifest = read_manifest(self.store)
            assert manifest  # opening an edit raises where there is none
            counts, again, rows = manifest.counts, 0, 0
        return totals(counts, self.cfg, units, units - again, time.monotonic() - began, rows)

    def _open_edit(self, plans: list[Plan]) -> Edit | None:
        cfg = self.cfg
        if cfg.retry:
            settings = {
                key: value
                for key, value in base_of(cfg, self.found.model).items()
                if key.startswith(("prompt", "engine", "decode", "gates"))
            }
            return open_retry(self.store, cfg.retry, settings, plans, cfg.output)
        if plans:
            next_plan(cfg, self.found, cfg.engine.device, plans)  # raises for other settings than those of the output
        return open_repair(self.store, plans, cfg.output, self.found.shards)

    def _job(self, fields: tuple[tuple[str, str], ...]) -> Job:
        cfg, template = self.cfg, self.found.model.template
        return Job(
            read_spec(cfg, fields), cfg.gates, cfg.engine, cfg.decode, template, fields, self.store, self.lease.id
        )

    # ---------------------------------------------------------------------------------------------------------- the run

    def fuse(self, began: float) -> dict[str, Any]:
        """Fuse what the output does not hold yet, and publish the manifest."""
        before = read_manifest(self.store)
        refuse_unfinished_edit(self.store, before)
        if before:
            clean(self.store, before)  # what a retry that was killed after its manifest has left
        state = self._open_output()
        refuse_lost_input(state.pending, self.found.shards)
        resumed = len(state.units) - len(state.pending)
        manifest = self._finish(state, before)
        seconds = time.monotonic() - began
        fresh = manifest.counts.done if not resumed else sum(unit.rows for unit in state.pending)
        return totals(manifest.counts, self.cfg, len(state.units), resumed, seconds, fresh)

    def _open_output(self) -> OutputState:
        """Plan what is not planned yet, and look up what is done."""
        plans = read_plans(self.store)
        plan = next_plan(self.cfg, self.found, self.cfg.engine.device, plans)
        if plan.units or not plans:
            if not write_plan(self.store, plan):
                raise ConfigError(
                    f"{self.store.root}: another driver just planned this output; run the same command again to join it"
                )
            self.store.put(config_path(plan.number), to_yaml(self.cfg).encode())
            plans.append(plan)
            log.info("plan %d: %d rows in %d units", plan.number, plan.rows, len(plan.units))
        entries = read_groups(self.store)
        return OutputState(self.store, plans, entries, committed(self.store))

    def _finish(self, state: OutputState, before: Manifest | None) -> Manifest:
        """From the pending units to the manifest; `before` where nothing is left to do."""
        began = time.monotonic()
        if before and not state.pending and len(before.units) == len(state.units):
            log.info("nothing is left to do: %s holds all %d planned rows", self.cfg.output.path, state.planned_rows)
            return before
        pool = self.executor.resolve_pool(self.cfg.engine, units=len(state.pending))
        entries = self._fuse_and_compact(state, pool)
        edition = len(before.revisions if before else ()) + 1
        rewriter = Rewriter(self.store, edition, state.plans[0].fields, self.cfg.output)
        entries = judge_repeats(rewriter, entries, self.cfg.gates.repeated_caption, self.lease.check)
        self.lease.check()
        manifest = self._publish(state, entries, before, pool, round(time.monotonic() - began, 1))
        clean(self.store, manifest)
        return manifest

    def _fuse_and_compact(self, state: OutputState, pool: Pool) -> list[GroupEntry]:
        """Fuse the pending units and compact every group; the entries of all groups."""
        compacted, pending = state.compacted, state.pending
        in_parts = [unit for unit in state.units if unit.id in state.in_parts - compacted]
        stale = state.in_parts & compacted
        with Progress(self.store, state.planned_rows, len(state.units), pool.max_actors, sys.stderr) as progress:
            compactor = Compactor(
                self.store, state.plans, state.entries, self.cfg.output, stale, self.lease.check, self.executor
            )
            for entry in state.entries:
                for summary in entry.units:
                    progress.resumed(summary)
            for summary in read_summaries(self.store, in_parts):
                progress.resumed(summary)
            for unit in in_parts:
                compactor.committed(unit.id)
            if pending:
                self._fuse_pending(state, pool, progress, compactor)
            missing = [unit for unit in pending if unit.id not in compactor.done]
            if missing:
                raise AccountingError(
                    f"{len(missing)} units ended without a commit, first {missing[0]}; run the same command again"
                )
            entries = compactor.finish()
            progress.save()
        return entries

    def _fuse_pending(self, state: OutputState, pool: Pool, progress: Progress, compactor: Compactor) -> None:
        pending = state.pending
        log.info(
            "%d of %d units to fuse, %d to %d actors", len(pending), len(state.units), pool.min_actors, pool.max_actors
        )
        job, reads = self._job(state.plans[0].fields), shard_reads(pending, self.found.shards)
        with self.executor.monitor(state.planned_rows, progress.rows, pool.max_actors) as monitor:
            for summary in self.executor.fuse(job, pool, reads):
                progress.committed(summary)
                monitor.committed(summary, progress.rows)
                compactor.committed(summary.id)

    def _publish(
        self, state: OutputState, entries: list[GroupEntry], before: Manifest | None, pool: Pool, seconds: float
    ) -> Manifest:
        """Assemble the manifest and swap it in, last. Raises AccountingError where another driver changed it meanwhile."""
        revisions = list(before.revisions) if before else []
        planned = sum(revision["kind"] in ("base", "extension") for revision in revisions)
        for plan in state.plans[planned:]:
            units = [unit for entry in entries if entry.plan == plan.number for unit in entry.units]
            revision = {
                "revision": plan.number,
                "kind": "extension" if plan.number > 1 else "base",
                "units": len(plan.units),
                "rows": plan.rows,
                "seconds": seconds,
            }
            revisions.append(revision | {"cost": cost(self.cfg, pool, plan, units)})
        manifest = assemble(state.plans, entries, revisions)
        swap_manifest(self.store, before, manifest)
        return manifest


def totals(counts: Counts, cfg: FuseConfig, units: int, resumed: int, seconds: float, fresh: int) -> dict[str, Any]:
    """The last line on stdout. `fresh`: the rows that this process fused; `resumed`: the units that were done before."""
    return {
        "rows": counts.rows,
        "rejects": counts.reasons,
        "filtered": counts.filtered_by,
        "flags": counts.flags,
        "units": units,
        "resumed_units": resumed,
        "seconds": round(seconds, 2),
        "captions_per_s": round(fresh / seconds, 3),
        "output": cfg.output.path,
    }
