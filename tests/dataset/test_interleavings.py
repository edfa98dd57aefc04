"""Attempts, kills, restarts, compactions, extensions and takedowns in any order leave every row in the output exactly once."""

import io
import uuid

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from outputs import FIELDS, DiesAt, part_of

from capsfusion_ray.config import OutputConfig, VerifyConfig
from capsfusion_ray.core.accounting import summarise
from capsfusion_ray.core.plan import Plan, PlannedShard
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.edit_record import begin_edit, refuse_unfinished_edit, unfinished_edit
from capsfusion_ray.dataset.editions import publish, sweep
from capsfusion_ray.dataset.manifest import assemble, read_groups, read_manifest, swap_manifest
from capsfusion_ray.dataset.plan_files import read_plans, write_plan
from capsfusion_ray.dataset.rewriter import Rewriter
from capsfusion_ray.dataset.takedown import remove_rows
from capsfusion_ray.dataset.unit_files import commit, committed, remove_parts
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.storage import Store

ROWS, GROUPS, UNITS_PER_GROUP = 3, 2, 2
NEVER = 10_000  # more writes than any step does


class OneOutput(RuleBasedStateMachine):
    """One output, changed by drivers and attempts. `first`: unit id -> the attempt whose rows must be in the output."""

    def __init__(self):
        super().__init__()
        self.output = OutputConfig(f"memory://{uuid.uuid4().hex}/out", target_file_rows=4)
        self.store = Store(self.output.path)
        self.first: dict[str, int] = {}
        self.taken: set[str] = set()
        self.attempts = 0
        self.plan()

    def teardown(self):
        for unit in self.units():
            if unit.id not in self.first:
                self.attempt(unit)
        self.end(NEVER)
        unfinished = unfinished_edit(self.store, read_manifest(self.store))
        if unfinished:
            self.take_down(unfinished["rows"], NEVER)
        verify(VerifyConfig(self.output, deep=True))
        assert self.rows() == {
            row_id: caption
            for unit in self.units()
            for row_id, caption in self.written(unit, self.first[unit.id])
            if row_id not in self.taken
        }
        self.store.delete([file.path for file in self.store.list()])

    # ------------------------------------------------------------------------------------------- what must be true

    def units(self):
        return [unit for plan in read_plans(self.store) for unit in plan.units]

    def compacted(self):
        return {unit.id for entry in read_groups(self.store) for unit in entry.units}

    def unfinished_takedown(self):
        manifest = read_manifest(self.store)
        return unfinished_edit(self.store, manifest) if manifest else None

    def rows(self):
        """row_id -> caption, as a reader of the folder sees them. Fails where a row is there twice."""
        tables = [
            pq.read_table(io.BytesIO(self.store.get(file.path)), partitioning=None) for file in self.store.list("data")
        ]
        rows = pa.concat_tables(tables).to_pylist()
        assert len({row["row_id"] for row in rows}) == len(rows)
        return {row["row_id"]: row["capsfusion"] for row in rows}

    @staticmethod
    def written(unit, attempt):
        return [(f"{unit.path}:{unit.start + i}", f"{unit.id} {attempt} {i}") for i in range(ROWS)]

    # ------------------------------------------------------------------------------------------- what may happen

    def plan(self):
        plans = read_plans(self.store)
        number = len(plans) + 1
        units = tuple(
            WorkUnit(
                f"p{number}u{i}",
                f"p{number}s{i // UNITS_PER_GROUP}",
                i * ROWS,
                (i + 1) * ROWS,
                f"g{i // UNITS_PER_GROUP:05d}",
            )
            for i in range(GROUPS * UNITS_PER_GROUP)
        )
        shards = tuple(PlannedShard(unit.path, "c", 99, unit.group) for unit in units)
        write_plan(self.store, Plan(number, {"k": "v"}, ROWS, FIELDS, units, shards))

    def attempt(self, unit):
        """Each attempt writes other captions, as an engine in bfloat16 may. The first one to commit decides the rows."""
        self.attempts += 1
        table = part_of(unit, ["fused"] * ROWS)
        captions = pa.array([caption for _, caption in self.written(unit, self.attempts)], pa.string())
        table = table.set_column(table.schema.get_field_index("capsfusion"), "capsfusion", captions)
        commit(self.store, table, summarise(UnitBatch(unit, table, Apart()), table))
        self.first.setdefault(unit.id, self.attempts)

    @rule(data=st.data())
    def an_attempt_commits_early_late_or_twice(self, data):
        self.attempt(data.draw(st.sampled_from(self.units())))

    @rule()
    def a_driver_starts(self):
        stale = self.compacted() & committed(self.store)
        remove_parts(self.store, [unit for unit in self.units() if unit.id in stale])

    @rule(dies_at=st.sampled_from([1, 2, 3, 4, NEVER]))
    def a_group_is_compacted(self, dies_at):
        compacted, parts = self.compacted(), committed(self.store)
        for plan in read_plans(self.store):
            for group in sorted({unit.group for unit in plan.units}):
                units = [unit for unit in plan.units if unit.group == group]
                if all(unit.id in parts and unit.id not in compacted for unit in units):
                    try:
                        compact_group(DiesAt(self.store, dies_at), group, plan.number, units, FIELDS, self.output)
                    except KeyboardInterrupt:
                        return

    @rule(dies_at=st.sampled_from([1, 2, 3, NEVER]))
    def a_run_ends(self, dies_at):
        if len(self.first) == len(self.units()) and not self.unfinished_takedown():
            self.end(dies_at)

    def end(self, dies_at):
        before = read_manifest(self.store)
        if before and unfinished_edit(self.store, before):
            return
        self.a_driver_starts()
        while self.compacted() != {unit.id for unit in self.units()}:
            self.a_group_is_compacted(NEVER)
        entries, plans = read_groups(self.store), read_plans(self.store)
        if before and len(before.units) == len(self.units()):
            return
        store = DiesAt(self.store, dies_at)
        revisions = list(before.revisions) if before else []
        revisions += [{"revision": len(revisions) + 1, "kind": "base"}] * (
            len(plans) - sum(r["kind"] == "base" for r in revisions)
        )
        try:
            manifest = assemble(plans, entries, revisions)
            swap_manifest(store, before, manifest)
            sweep(store, manifest)
        except KeyboardInterrupt:
            return

    @precondition(
        lambda self: len(self.first) > 2 and len(read_plans(self.store)) < 3 and not self.unfinished_takedown()
    )
    @rule()
    def the_input_gains_shards(self):
        self.plan()

    @precondition(lambda self: read_manifest(self.store))
    @rule(data=st.data(), dies_at=st.sampled_from([1, 2, 3, 4, 5, NEVER]))
    def rows_are_taken_down(self, data, dies_at):
        """Of one unit or of several. One edition may rewrite two groups that have the same name in different plans."""
        units = data.draw(st.lists(st.sampled_from(self.units()), min_size=1, max_size=3, unique=True))
        self.take_down([f"{unit.path}:{unit.start}" for unit in units], dies_at)

    def take_down(self, row_ids, dies_at):
        store = DiesAt(self.store, dies_at)
        manifest = read_manifest(self.store)
        try:
            edition = begin_edit(store, manifest, {"kind": "takedown", "rows": row_ids})
        except ConfigError:  # an unfinished edit or extension comes first
            begun_before = self.unfinished_takedown()
            assert begun_before["rows"] != row_ids if begun_before else len(manifest.units) < len(self.units())
            return
        except KeyboardInterrupt:
            return
        self.taken |= set(row_ids)
        rewriter = Rewriter(store, edition, FIELDS, self.output)
        try:
            for entry in read_groups(self.store):
                if entry.edition != edition:
                    remove_rows(rewriter, entry, lambda rows: pc.is_in(rows["row_id"], pa.array(row_ids)))
            sweep(store, publish(store, manifest, {"revision": edition, "kind": "takedown"}))
        except KeyboardInterrupt:
            return
        refuse_unfinished_edit(self.store, read_manifest(self.store))


TestOneOutput = OneOutput.TestCase
TestOneOutput.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)


def test_groups_of_two_plans_with_the_same_name_are_rewritten_in_one_edition():
    """A pilot and the full run after it have an entry per group each, and their new files are in the same folder."""
    one = OneOutput()
    for _ in range(2):
        for unit in one.units():
            one.attempt(unit)
        one.end(NEVER)
        one.plan()
    for unit in one.units():
        one.attempt(unit)
    one.end(NEVER)
    one.take_down([f"{unit.path}:{unit.start}" for unit in one.units()], NEVER)
    assert len(one.rows()) == 3 * GROUPS * UNITS_PER_GROUP * (ROWS - 1)
    one.teardown()
