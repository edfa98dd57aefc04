"""A repair names damaged and missing files and recomputes their units alone, wherever it is killed. The local executor runs it."""

from contextlib import closing

import pytest
from echo_run import LEASE, LOCAL, POOL, STRICT, config, finished, killed_at_every_write, local, rows_of

from capsfusion_ray import sources
from capsfusion_ray.config import GateConfig, VerifyConfig
from capsfusion_ray.core import repeated_captions as repeats
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.dataset.edit_record import refuse_unfinished_edit
from capsfusion_ray.dataset.editions import sweep
from capsfusion_ray.dataset.layout import MANIFEST
from capsfusion_ray.dataset.manifest import assemble, read_groups, read_manifest
from capsfusion_ray.dataset.mark_repeated import judge_repeats
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.rewriter import Rewriter
from capsfusion_ray.dataset.takedown import takedown
from capsfusion_ray.dataset.takedown_criteria import TakedownConfig
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.errors import AccountingError, ConfigError, SourceError
from capsfusion_ray.run.edits import base as edit_module
from capsfusion_ray.run.edits.base import run_edit
from capsfusion_ray.run.edits.repair_files import open_repair
from capsfusion_ray.run.executors.local import LocalExecutor
from capsfusion_ray.run.stages import Job
from capsfusion_ray.run.survey import read_spec
from capsfusion_ray.storage import Store


class Recorder(LocalExecutor):
    """Keeps the ids of the units that it fuses."""

    def __init__(self):
        super().__init__(LOCAL)
        self.units = []

    def fuse(self, *args):
        for summary in super().fuse(*args):
            self.units.append(summary.id)
            yield summary


def repair_of(path, store, partition_by="shard", executor=None):
    """One `repair=true` command; None where nothing is left to do."""
    cfg = config(path, *STRICT, f"output.partition_by={partition_by}")
    plans = read_plans(store)
    shards = sources.discover(cfg.input, cfg.source)
    repair = open_repair(store, plans, cfg.output, shards)
    if repair is None:
        return None
    fields = plans[0].fields
    job = Job(read_spec(cfg, fields), cfg.gates, cfg.engine, cfg.decode, TEMPLATE, fields, store, "run")
    with closing(executor or local()) as executor:
        return run_edit(repair, job, executor, POOL, LEASE)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def break_one(path, how, kind="data"):
    """Damage the first file of a kind; its path in the output, and the ids of its units."""
    entry = next(file for file in read_manifest(Store(str(path / "out"))).files if file.kind == kind)
    file = path / "out" / entry.path
    file.unlink() if how == "missing" else flip_a_byte(file)
    return entry.path, {unit for unit, _ in entry.units}


@pytest.mark.parametrize("partition_by", ["shard", "lang"])
@pytest.mark.parametrize("kind", ["data", "rejected"])
@pytest.mark.parametrize("how", ["missing", "corrupt"])
def test_only_the_units_of_the_damaged_file_are_recomputed(tmp_path, how, kind, partition_by):
    before = finished(tmp_path, partition_by)
    rows = rows_of(tmp_path, "data") | rows_of(tmp_path, "rejected")
    broken, units = break_one(tmp_path, how, kind)
    with pytest.raises(AccountingError, match="repair=true") as refused:
        verify(VerifyConfig(config(tmp_path).output))
    assert broken in str(refused.value)

    recorder = Recorder()
    counts = repair_of(tmp_path, Store(str(tmp_path / "out")), partition_by, recorder)
    assert set(recorder.units) == units
    assert len(units) < len(before.units)
    assert (counts.fused, counts.rejected, counts.reasons) == (
        before.counts.fused,
        before.counts.rejected,
        before.counts.reasons,
    )
    assert rows_of(tmp_path, "data") | rows_of(tmp_path, "rejected") == rows
    verify(VerifyConfig(config(tmp_path).output, deep=True))
    assert repair_of(tmp_path, Store(str(tmp_path / "out")), partition_by) is None, "nothing is left to do"


def test_a_repair_killed_at_any_write_and_repeated_ends_the_same(tmp_path):
    finished(tmp_path / "calm")
    killed_at_every_write(
        tmp_path, repair_of, rows_of(tmp_path / "calm", "data"), prepare=lambda path: break_one(path, "corrupt")
    )


def test_damage_that_came_after_a_killed_repair_began_is_repaired_by_the_next(tmp_path, monkeypatch):
    finished(tmp_path)
    want = rows_of(tmp_path, "data")
    store = Store(str(tmp_path / "out"))
    first, *_, second = [file for file in read_manifest(store).files if file.kind == "data"]
    flip_a_byte(tmp_path / "out" / first.path)
    with monkeypatch.context() as patched:
        patched.setattr(edit_module, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            repair_of(tmp_path, store)
    flip_a_byte(tmp_path / "out" / second.path)
    repair_of(tmp_path, store)
    repair_of(tmp_path, store)
    verify(VerifyConfig(config(tmp_path).output, deep=True))
    assert rows_of(tmp_path, "data") == want


def test_recomputed_rows_are_marked_as_repeated_as_they_were(tmp_path, monkeypatch):
    manifest = finished(tmp_path)
    monkeypatch.setattr(repeats, "MIN_PAIRS", 1)  # in so small a run every caption is then repeated too often
    store = Store(str(tmp_path / "out"))
    plans = read_plans(store)
    entries = judge_repeats(
        Rewriter(store, 1, plans[0].fields, config(tmp_path).output),
        read_groups(store),
        GateConfig("flag", 0.001),
        lambda: None,
    )
    judged = assemble(plans, entries, manifest.revisions)
    store.put(MANIFEST, judged.to_bytes())
    sweep(store, judged)
    want = rows_of(tmp_path, "data")
    assert judged.counts.flags["repeated_caption"] == len(want)
    break_one(tmp_path, "corrupt")
    assert repair_of(tmp_path, store).flags == judged.counts.flags
    assert rows_of(tmp_path, "data") == want
    verify(VerifyConfig(config(tmp_path).output, deep=True))


def test_rows_that_were_taken_down_do_not_come_back(tmp_path):
    finished(tmp_path)
    gone = tmp_path / "gone.txt"
    gone.write_text("\n".join(row_id for row_id in sorted(rows_of(tmp_path, "data"))[:2]))
    takedown(TakedownConfig(config(tmp_path).output, row_ids=str(gone)))
    store = Store(str(tmp_path / "out"))
    entry = next(file for file in read_manifest(store).files if file.kind == "data")
    flip_a_byte(tmp_path / "out" / entry.path)
    before = store.get(MANIFEST)
    with pytest.raises(ConfigError, match="had rows taken down, and a repair would bring them back"):
        repair_of(tmp_path, store)
    assert store.get(MANIFEST) == before


def test_a_lost_shard_is_named_before_the_repair_is_begun(tmp_path):
    manifest = finished(tmp_path)
    break_one(tmp_path, "missing")
    (tmp_path / "in" / "a.parquet").unlink()
    store = Store(str(tmp_path / "out"))
    with pytest.raises(SourceError, match=r"a\.parquet: units that are not done need this shard"):
        repair_of(tmp_path, store)
    refuse_unfinished_edit(store, manifest)


def test_an_unfinished_output_cannot_be_repaired(tmp_path):
    with pytest.raises(ConfigError, match="needs a finished output"):
        open_repair(Store(str(tmp_path)), [], config(tmp_path).output, [])
