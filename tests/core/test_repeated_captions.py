"""One caption for too many pairs: counted per group, judged over the run, marked, and the accounting still closes."""

from collections import Counter
from contextlib import closing
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_run import LEASE, LOCAL, POOL
from hypothesis import given
from hypothesis import strategies as st
from outputs import FIELDS, DiesAt, part_of, units_of

from capsfusion_ray.config import EngineConfig, GateConfig, GatesConfig, OutputConfig, VerifyConfig
from capsfusion_ray.core.accounting import summarise
from capsfusion_ray.core.plan import Plan, PlannedShard
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.core.repeated_captions import MIN_PAIRS, RECORDED, Tally, after_retry, caption_key, repeated
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.editions import sweep
from capsfusion_ray.dataset.layout import MANIFEST
from capsfusion_ray.dataset.manifest import assemble, read_groups, read_manifest
from capsfusion_ray.dataset.mark_repeated import judge_repeats
from capsfusion_ray.dataset.plan_files import read_plans, write_plan
from capsfusion_ray.dataset.rewriter import Rewriter
from capsfusion_ray.dataset.unit_files import commit
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.run.edits.base import run_edit
from capsfusion_ray.run.edits.retry_rejected import open_retry
from capsfusion_ray.run.executors.local import LocalExecutor
from capsfusion_ray.run.stages import Job
from capsfusion_ray.storage import Store

LOST = "The product is shown in the image."
OUTPUT = OutputConfig("", target_file_rows=10)


def rows_of(captions, raws, kept=()):
    return pa.table(
        {
            "laion_2b": pa.array(raws, pa.string()),
            "laion_coco": pa.array(["s"] * len(captions), pa.string()),
            "capsfusion": pa.array(captions, pa.string()),
            "flags": pa.array(
                [["kept", "boilerplate"] if i in kept else [] for i in range(len(captions))], pa.list_(pa.string())
            ),
        }
    )


@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=30), min_size=1, max_size=4))
def test_captions_are_counted_once_per_different_pair_of_a_group(groups):
    notes, want = [], Counter()
    for rows in groups:
        tally = Tally()
        tally.add(rows_of([c for c, _ in rows], [str(r) for _, r in rows]))
        notes.append(tally.most_repeated())
        want.update(caption for caption, _ in set(rows))
    assert repeated(notes, 0, 0.5) == {caption_key(c): n for c, n in want.items() if n >= MIN_PAIRS}
    total = Counter()
    for note in notes:
        total.update(note)
    assert total == {caption_key(c): n for c, n in want.items()}


def test_a_large_group_keeps_its_most_repeated_captions_and_a_small_run_has_no_repeated_ones():
    tally = Tally()
    captions = [f"c{i}" for i in range(3 * RECORDED)] + [LOST] * 7
    tally.add(rows_of(captions, [str(i) for i in range(len(captions))]))
    noted = tally.most_repeated()
    assert len(noted) == RECORDED
    assert noted[caption_key(LOST)] == 7
    assert repeated([noted], 7, 0.001) == {}


def test_kept_captions_do_not_count():
    tally = Tally()
    tally.add(rows_of([LOST, LOST, "other"], ["1", "2", "3"], kept={0, 1}))
    assert set(tally.most_repeated()) == {caption_key("other")}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), unique=True, max_size=20),
    st.integers(0, 20),
    st.lists(st.sampled_from("abcd"), max_size=8),
)
def test_after_a_retry_a_group_counts_as_if_its_rows_had_been_written_so_at_first(rows, gone, captions):
    def tally(of):
        counted = Tally()
        counted.add(rows_of([c for c, _ in of], [str(r) for _, r in of]))
        return counted

    left, come = rows[gone:], [(caption, f"new {i}") for i, caption in enumerate(captions)]
    noted = after_retry(tally(rows).most_repeated(), tally(rows[:gone]), tally(come))
    assert list(noted.items()) == list(tally(left + come).most_repeated().items())


def compacted(store):
    """Six units of ten rows in two groups: every second fused row has the same caption for another picture."""
    units = units_of(6, 10)
    plan = Plan(1, {"k": "v"}, 10, FIELDS, tuple(units), tuple(PlannedShard(u.path, "c", 99, u.group) for u in units))
    write_plan(store, plan)
    for unit in units:
        table = part_of(unit, ["fused"] * 8 + ["kept", "rejected"])
        flags = [["lost_entity"] if n < 8 else row for n, row in enumerate(table["flags"].to_pylist())]
        table = table.set_column(table.schema.get_field_index("flags"), "flags", pa.array(flags, pa.list_(pa.string())))
        numbers = range(unit.start, unit.stop)
        for name, values in (
            ("laion_2b", [f"raw {n}" for n in numbers]),
            ("capsfusion", [LOST if n % 2 else f"c {n}" for n in numbers]),
        ):
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
        commit(store, table, summarise(UnitBatch(unit, table, Apart()), table))
    entries = [
        compact_group(store, g, 1, [u for u in units if u.group == g], FIELDS, OUTPUT) for g in ("g00000", "g00001")
    ]
    return plan, entries


def judged(store, plan, action):
    """The end of a run, without Ray: judge, publish, sweep."""
    rewriter = Rewriter(store, 1, FIELDS, OUTPUT)
    entries = judge_repeats(rewriter, read_groups(store), GateConfig(action, 0.001), lambda: None)
    manifest = assemble([plan], entries, [{"revision": 1, "kind": "base"}])
    store.put(MANIFEST, manifest.to_bytes())
    sweep(store, manifest)
    return manifest


def read(root, kind):
    files = (root / kind).rglob("*.parquet")
    return {row["row_id"]: row for file in files for row in pq.read_table(file, partitioning=None).to_pylist()}


@pytest.mark.parametrize("action", ["flag", "reject", "ignore"])
def test_a_caption_of_too_many_pairs_is_marked(tmp_path, action):
    store = Store(str(tmp_path))
    plan, _ = compacted(store)
    manifest = judged(store, plan, action)
    verify(VerifyConfig(OutputConfig(str(tmp_path)), deep=True))
    data, rejected = read(tmp_path, "data"), read(tmp_path, "rejected")
    lost = 6 * 4
    assert manifest.counts.flags.get("repeated_caption", 0) == (lost if action == "flag" else 0)
    assert manifest.counts.reasons.get("repeated_caption", 0) == (lost if action == "reject" else 0)
    assert (len(data), len(rejected)) == ((54 - lost, 6 + lost) if action == "reject" else (54, 6))
    assert manifest.counts.flags["lost_entity"] == sum("lost_entity" in row["flags"] for row in data.values())
    flagged = {row_id for row_id, row in data.items() if "repeated_caption" in row["flags"]}
    assert len(flagged) == (lost if action == "flag" else 0)
    assert all(data[row_id]["capsfusion"] == LOST for row_id in flagged)
    if action == "reject":
        assert Counter(row["reason"] for row in rejected.values())["repeated_caption"] == lost
        assert {row["detail"] for row in rejected.values() if row["reason"] == "repeated_caption"} == {
            f"{lost} pairs got this caption"
        }


@pytest.mark.parametrize("action", ["flag", "reject"])
def test_killed_at_every_write_and_repeated_it_marks_the_same(tmp_path, action):
    calm = Store(str(tmp_path / "calm"))
    want = judged(calm, compacted(calm)[0], action)
    for at in range(1, 30):
        root = tmp_path / str(at)
        store = Store(str(root))
        plan, _ = compacted(store)
        try:
            judged(DiesAt(store, at), plan, action)
        except KeyboardInterrupt:
            assert judged(store, plan, action) == want
            verify(VerifyConfig(OutputConfig(str(root)), deep=True))
            assert read(root, "data") == read(tmp_path / "calm", "data")
        else:
            assert at > 4
            return
    raise AssertionError("it was still killed at write 29")


def test_judging_again_changes_nothing(tmp_path):
    store = Store(str(tmp_path))
    plan, _ = compacted(store)
    first = judged(store, plan, "flag")
    entries, files = read_groups(store), {file.path: store.get(file.path) for file in store.list()}
    again = judge_repeats(Rewriter(store, 2, FIELDS, OUTPUT), entries, GateConfig("flag", 0.001), lambda: None)
    assert again == entries
    assert [entry.edition for entry in again] == [1, 1], "both groups were rewritten by the first judgement"
    assert first.counts.flags["repeated_caption"] == 24
    assert {file.path: store.get(file.path) for file in store.list()} == files


# ------------------------------------------------------------------------------------------------------- in a retry

OTHER = "An image of a product."


class Writes(LocalExecutor):
    """In place of the engine and its gates: row n gets `caption(n)` and is fused."""

    def __init__(self, caption):
        super().__init__(LOCAL)
        self._caption = caption

    def fuse(self, job, pool, reads):
        for batch in (batch for task in reads for batch in task.read(job)):
            numbers = [int(row_id.rpartition(":")[2]) for row_id in batch.table["row_id"].to_pylist()]
            part = part_of(batch.unit, ["fused"] * len(numbers))
            columns = {
                "laion_2b": "raw {}".format,
                "capsfusion": self._caption,
                "row_id": f"{batch.unit.path}:{{}}".format,
            }
            for name, values in ((name, list(map(write, numbers))) for name, write in columns.items()):
                part = part.set_column(part.schema.get_field_index(name), name, pa.array(values, pa.string()))
            summary = summarise(UnitBatch(batch.unit, part, batch.apart), part)
            commit(job.output, part, summary)
            yield summary


def retried(store, caption, action, reasons="rejected"):
    """`retry=…` with an engine that writes `caption(row number)`."""
    retry = open_retry(store, reasons, {"seed": caption(0), "action": action}, read_plans(store), OUTPUT)
    if retry is None:  # killed after it published the manifest
        return read_manifest(store).counts
    gates = GatesConfig(repeated_caption=GateConfig(action, 0.001))
    job = Job(None, gates, EngineConfig(), SimpleNamespace(), TEMPLATE, FIELDS, store, "run")
    with closing(Writes(caption)) as executor:
        counts = run_edit(retry, job, executor, POOL, LEASE)
    verify(VerifyConfig(OutputConfig(store.root), deep=True))
    return counts


def rejected_once(root):
    """An output with its 24 repeated rows rejected, and its counts."""
    store = Store(str(root))
    plan, _ = compacted(store)
    return store, judged(store, plan, "reject").counts


def test_a_retry_that_writes_the_same_caption_again_stays_rejected(tmp_path):
    store, before = rejected_once(tmp_path)
    assert before.reasons["repeated_caption"] == 24
    assert retried(store, lambda n: LOST, "reject", "repeated_caption").reasons == before.reasons
    assert {row["detail"] for row in read(tmp_path, "rejected").values() if row["reason"] == "repeated_caption"} == {
        "24 pairs got this caption"
    }
    assert LOST not in {row["capsfusion"] for row in read(tmp_path, "data").values()}


def test_after_a_retry_with_other_captions_the_repeated_one_is_no_longer_counted(tmp_path):
    store, before = rejected_once(tmp_path)
    counts = retried(store, lambda n: f"new {n}", "reject", "repeated_caption")
    assert counts.fused == before.fused + 24
    assert "repeated_caption" not in counts.reasons
    assert not any(caption_key(LOST) in entry.repeats for entry in read_groups(store))


@pytest.mark.parametrize("action", ["flag", "reject", "ignore"])
def test_rows_of_a_retry_that_repeats_a_caption_are_marked_and_no_others(tmp_path, action):
    store, before = rejected_once(tmp_path)
    data = {p: p.read_bytes() for p in (tmp_path / "data").rglob("*.parquet")}
    rejected = before.rejected
    assert rejected == 30
    counts = retried(store, lambda n: OTHER, action)
    assert counts.reasons.get("repeated_caption", 0) == (rejected if action == "reject" else 0)
    assert counts.flags.get("repeated_caption", 0) == (rejected if action == "flag" else 0)
    assert counts.fused == before.fused + (0 if action == "reject" else rejected)
    assert all(p.read_bytes() == bytes_ for p, bytes_ in data.items()), "data files that were there are unchanged"


def test_a_retry_killed_at_every_write_marks_the_same(tmp_path):
    want = retried(rejected_once(tmp_path / "calm")[0], lambda n: OTHER if n % 3 else f"new {n}", "flag")
    assert 0 < want.flags["repeated_caption"] < 30
    died, at = True, 0
    while died:
        at += 1
        store, _ = rejected_once(tmp_path / str(at))
        try:
            retried(DiesAt(store, at), lambda n: OTHER if n % 3 else f"new {n}", "flag")
            died = False
        except KeyboardInterrupt:
            assert retried(store, lambda n: OTHER if n % 3 else f"new {n}", "flag") == want
        assert read(tmp_path / str(at), "data") == read(tmp_path / "calm", "data")
    assert at > 6
