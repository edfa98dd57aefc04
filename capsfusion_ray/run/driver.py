"""One run: survey the input -> plan -> pending units -> pipeline, compacting as groups finish -> manifest -> totals."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
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
from capsfusion_ray.run import cluster
from capsfusion_ray.run.compactor import Compactor
from capsfusion_ray.run.cost import cost
from capsfusion_ray.run.edits.base import Revision, run_revision
from capsfusion_ray.run.edits.repair_files import open_repair
from capsfusion_ray.run.edits.retry_rejected import open_retry, reasons_of
from capsfusion_ray.run.pipeline import Job, Pool, run_units
from capsfusion_ray.run.progress import Progress
from capsfusion_ray.run.prometheus import RunMonitor
from capsfusion_ray.run.survey import OutputState, Survey, base_of, next_plan, read_spec, survey
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)


def fuse(cfg: FuseConfig) -> dict[str, Any]:
    """jobs/fuse.py: plan, or pick up the plan; fuse what is pending; compact; verify the sums; write the manifest."""
    began = time.monotonic()
    found = survey(cfg)
    if cfg.retry:
        reasons_of(cfg.retry)  # a wrong name is said here, before any cluster
    store = Store(cfg.output.path, cfg.output.storage)
    store.check_writable(RUN_DIR)
    if not store.conditional_put:
        log.warning(
            "%s: this store has no conditional writes; never let two drivers work on one output", cfg.output.path
        )
    with Lease(store, cfg.takeover, cfg.lease_wait_s) as lease:
        return _fuse(cfg, found, store, lease, began)


def _fuse(cfg: FuseConfig, found: Survey, store: Store, lease: Lease, began: float) -> dict[str, Any]:
    resources = cluster.connect(cfg.cluster)
    try:
        engine, decode = resolve_with_model(cfg.engine, cfg.decode, found.model)
        pool = cluster.resolve_pool(cfg.cluster, engine, resources, units=sys.maxsize)
        engine = cluster.resolve_engine(engine, pool, resources)
        cfg = dataclasses.replace(cfg, engine=engine, decode=decode)
        if cfg.retry or cfg.repair:
            return _revise(cfg, found, store, pool, lease, began)
        refuse_unfinished_edit(store, before := read_manifest(store))
        if before:
            clean(store, before)  # what a retry that was killed after its manifest left
        run = _open_run(cfg, found, store, engine.device)
        pool = cluster.resolve_pool(cfg.cluster, engine, resources, units=len(run.pending))
        resumed = len(run.units) - len(run.pending)
        refuse_lost_input(run.pending, found.shards)
        manifest = _work(cfg, found, run, before, pool, lease)
    finally:
        cluster.disconnect()
    seconds = time.monotonic() - began
    fresh = manifest.counts.done if not resumed else sum(unit.rows for unit in run.pending)
    return totals(manifest.counts, cfg, len(run.units), resumed, seconds, fresh)


def _revise(cfg: FuseConfig, found: Survey, store: Store, pool: Pool, lease: Lease, began: float) -> dict[str, Any]:
    """The retry or the repair that is asked for."""
    plans = read_plans(store)
    revision = _open_revision(cfg, found, store, plans)
    units = [unit for plan in plans for unit in plan.units]
    if revision:
        job = _job(cfg, found, plans[0].fields, store, lease)
        counts, again, rows = run_revision(revision, job, pool, lease), len(revision.units), revision.rows
    else:
        log.info(
            "nothing is left to do: %s",
            "this very retry was done" if cfg.retry else "every file is as the manifest says",
        )
        manifest = read_manifest(store)
        assert manifest  # opening a revision raises where there is none
        counts, again, rows = manifest.counts, 0, 0
    return totals(counts, cfg, len(units), len(units) - again, time.monotonic() - began, rows)


def _open_revision(cfg: FuseConfig, found: Survey, store: Store, plans: list[Plan]) -> Revision | None:
    if cfg.retry:
        settings = {
            key: value
            for key, value in base_of(cfg, found.model).items()
            if key.startswith(("prompt", "engine", "decode", "gates"))
        }
        return open_retry(store, cfg.retry, settings, plans, cfg.output)
    if plans:
        next_plan(cfg, found, cfg.engine.device, plans)  # refuses other settings than those of the output
    return open_repair(store, plans, cfg.output, found.shards)


def _job(cfg: FuseConfig, found: Survey, fields: tuple[tuple[str, str], ...], store: Store, lease: Lease) -> Job:
    return Job(read_spec(cfg, fields), cfg.gates, cfg.engine, cfg.decode, found.model.template, fields, store, lease.id)


def _open_run(cfg: FuseConfig, found: Survey, store: Store, device: str) -> OutputState:
    plans = read_plans(store)
    plan = next_plan(cfg, found, device, plans)
    if plan.units or not plans:
        if not write_plan(store, plan):
            raise ConfigError(
                f"{store.root}: another driver just planned this output; run the same command again to join it"
            )
        store.put(config_path(plan.number), to_yaml(cfg).encode())
        plans.append(plan)
        log.info("plan %d: %d rows in %d units", plan.number, plan.rows, len(plan.units))
    entries = read_groups(store)
    return OutputState(store, plans, entries, committed(store))


def _work(
    cfg: FuseConfig, found: Survey, run: OutputState, before: Manifest | None, pool: Pool, lease: Lease
) -> Manifest:
    pending = run.pending
    began = time.monotonic()
    if before and not pending and len(before.units) == len(run.units):
        log.info("nothing is left to do: %s holds all %d planned rows", cfg.output.path, run.planned_rows)
        return before
    job = _job(cfg, found, run.plans[0].fields, run.store, lease)
    shards = {shard.path: shard for shard in found.shards}
    compacted = run.compacted
    waiting = run.in_parts - compacted
    in_parts = [unit for unit in run.units if unit.id in waiting]
    progress = Progress(run.store, run.planned_rows, len(run.units), pool.max_actors, sys.stderr)
    with (
        progress,
        Compactor(run.store, run.plans, run.entries, cfg.output, run.in_parts & compacted, lease.check) as compactor,
    ):
        for summary in [unit for entry in run.entries for unit in entry.units] + read_summaries(run.store, in_parts):
            progress.resumed(summary)
        for unit in in_parts:
            compactor.committed(unit.id)
        if pending:
            log.info(
                "%d of %d units to fuse, %d to %d actors",
                len(pending),
                len(run.units),
                pool.min_actors,
                pool.max_actors,
            )
            with RunMonitor(run.planned_rows, progress.rows, pool.max_actors) as monitor:
                for summary in run_units(job, pool, pending, shards):
                    progress.committed(summary)
                    monitor.committed(summary, progress.rows)
                    compactor.committed(summary.id)
        missing = [unit for unit in pending if unit.id not in compactor.done]
        if missing:
            raise AccountingError(
                f"{len(missing)} units ended without a commit, first {missing[0]}; run the same command again"
            )
        entries = compactor.finish()
        progress.save()
    rewriter = Rewriter(run.store, len(before.revisions if before else ()) + 1, run.plans[0].fields, cfg.output)
    entries = judge_repeats(rewriter, entries, cfg.gates.repeated_caption, lease.check)
    lease.check()
    manifest = _publish(run, entries, before, round(time.monotonic() - began, 1), cfg, pool)
    clean(run.store, manifest)
    return manifest


def _publish(
    run: OutputState, entries: list[GroupEntry], before: Manifest | None, seconds: float, cfg: FuseConfig, pool: Pool
) -> Manifest:
    """Assemble the manifest and swap it in, last."""
    revisions = list(before.revisions) if before else []
    planned = sum(revision["kind"] in ("base", "extension") for revision in revisions)
    for plan in run.plans[planned:]:
        kind = "extension" if plan.number > 1 else "base"
        revision = {
            "revision": plan.number,
            "kind": kind,
            "units": len(plan.units),
            "rows": plan.rows,
            "seconds": seconds,
        }
        units = [unit for entry in entries if entry.plan == plan.number for unit in entry.units]
        revisions.append(revision | {"cost": cost(cfg, pool, plan, units)})
    manifest = assemble(run.plans, entries, revisions)
    swap_manifest(run.store, before, manifest)
    return manifest


def totals(counts: Counts, cfg: FuseConfig, units: int, resumed: int, seconds: float, fresh: int) -> dict[str, Any]:
    """The last line on stdout. `fresh`: rows that this process worked on."""
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
