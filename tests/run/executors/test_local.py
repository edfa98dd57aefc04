"""The local executor leaves the output that a Ray cluster leaves, and what one process cannot do it says."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drivers import resumable
from lighthouses import captions
from outputs import flip_a_bit, snapshot

from capsfusion_ray.config import ClusterConfig, EngineConfig, FuseConfig, VerifyConfig, parse_config
from capsfusion_ray.dataset.lease import Lease
from capsfusion_ray.dataset.manifest import read_manifest
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.engines.echo import EchoEngine
from capsfusion_ray.errors import ConfigError, EngineError
from capsfusion_ray.run.driver import fuse
from capsfusion_ray.run.engine_loop import EngineLoop
from capsfusion_ray.run.executors.local import LocalExecutor
from capsfusion_ray.storage import Store

ROOT = Path(__file__).resolve().parents[3]
LOCAL = ClusterConfig(kind="local")
# The command, with 0.2 s per unit.
SLOW = """
import sys, time
from capsfusion_ray.cli import main
from capsfusion_ray.engines.echo import EchoEngine
step = EchoEngine.step
EchoEngine.step = lambda self: time.sleep(0.2) or step(self)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def corpus(tmp_path):
    """Three shards, 90 rows."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, count in (("a", 40), ("b", 30), ("c", 20)):
        pq.write_table(pa.Table.from_pylist(captions(name, count)), folder / f"{name}.parquet", row_group_size=16)
    return folder


def words(corpus, output, *more):
    return [
        f"input.path={corpus}",
        f"output.path={output}",
        "engine.kind=echo",
        "cluster.kind=local",
        "unit.rows=8",
        "output.target_file_rows=25",
        "source.passthrough=[width]",
        *more,
    ]


def run(corpus, output, *more, executor=None):
    return fuse(parse_config(FuseConfig, words(corpus, output, *more)), executor)


def check(output):
    return verify(parse_config(VerifyConfig, [f"output.path={output}", "deep=true"]))["rows"]


def test_a_whole_command_runs_without_ray_and_without_torch(corpus, tmp_path):
    """Asked of a process of its own: a run, its report, and the libraries that it loaded."""
    look = (
        "import sys; from capsfusion_ray.cli import main; code = main(sys.argv[1:]); "
        "found = {'ray', 'torch', 'transformers'} & sys.modules.keys(); print(found, file=sys.stderr); sys.exit(code or bool(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", look, "fuse", *words(corpus, tmp_path / "out")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"]["planned"] == 90
    assert (tmp_path / "out" / "report.html").is_file()
    check(tmp_path / "out")


def test_one_outputs_life_a_pilot_the_whole_nothing_to_do_an_extension(corpus, tmp_path):
    output = tmp_path / "out"
    pilot = run(corpus, output, "input.limit=20")
    assert pilot["rows"]["planned"] == 20
    pilot_files = snapshot(output)
    whole = run(corpus, output)
    assert whole["rows"]["planned"] == 90
    assert whole["resumed_units"] == pilot["units"]
    assert pilot_files.items() <= snapshot(output).items()
    assert run(corpus, output)["resumed_units"] == whole["units"]
    (corpus / "d.parquet").write_bytes((corpus / "c.parquet").read_bytes())
    assert run(corpus, output)["rows"]["planned"] == 110
    assert [revision["kind"] for revision in read_manifest(Store(str(output))).revisions] == [
        "base",
        *["extension"] * 2,
    ]
    assert check(output)["planned"] == 110


def test_a_retry_fuses_what_was_rejected(corpus, tmp_path):
    output, six_words = tmp_path / "out", "decode.max_new_tokens=6"
    before = run(corpus, output, "gates.cut_off={action: reject, threshold: 1, flag_from: null}", six_words)
    assert before["rows"]["rejected"] == 90, "no caption of six words ends"
    mild = "gates.cut_off={action: flag, threshold: 1, flag_from: null}"
    assert run(corpus, output, "retry=rejected", mild, six_words)["rows"]["fused"] == 90
    assert check(output)["fused"] == 90


def test_a_repair_brings_back_what_a_damaged_file_held(corpus, tmp_path):
    output = tmp_path / "out"
    run(corpus, output)

    def rows():
        tables = [pq.read_table(file, partitioning=None) for file in (output / "data").rglob("*.parquet")]
        return sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: row["row_id"])

    want = rows()
    flip_a_bit(output / "data")
    assert run(corpus, output, "repair=true")["rows"]["planned"] == 90
    check(output)
    assert rows() == want


def test_a_killed_process_is_resumed_to_the_very_files_of_an_undisturbed_run(corpus, tmp_path):
    run(corpus, tmp_path / "undisturbed")
    output = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW, "fuse", *words(corpus, output)], cwd=ROOT)
    while resumable(Store(str(output))) < 3:
        assert process.poll() is None, "the run was over before its kill"
        time.sleep(0.02)
    process.kill()
    process.wait()
    last = run(corpus, output)
    assert 0 < last["resumed_units"] < last["units"]
    assert snapshot(output) == snapshot(tmp_path / "undisturbed")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_cleanly_and_the_same_command_resumes(corpus, tmp_path, signum):
    output = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, "fuse", *words(corpus, output)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while resumable(Store(str(output))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert json.loads((output / "_run" / "lease.json").read_bytes())["released"], "no driver has to wait for it"
    assert run(corpus, output)["resumed_units"] > 0
    assert check(output)["planned"] == 90


def test_two_drivers_on_one_output_are_refused(corpus, tmp_path):
    output = tmp_path / "out"
    with Lease(Store(str(output))), pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
        run(corpus, output)


class DiesAtThird(EchoEngine):
    """A CUDA error in the third step of the process."""

    steps = 0

    def step(self):
        DiesAtThird.steps += 1
        if DiesAtThird.steps == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().step()


class Hangs(EchoEngine):
    def step(self):
        threading.Event().wait()


def test_a_finished_run_leaves_no_thread_behind(corpus, tmp_path, monkeypatch):
    """A thread that frees the engine's tensors while the interpreter shuts down aborts the process: exit code 134."""
    watch = EngineLoop._watch

    def watch_and_end_late(loop):
        watch(loop)
        time.sleep(0.5)

    monkeypatch.setattr(EngineLoop, "_watch", watch_and_end_late)
    before = set(threading.enumerate())
    run(corpus, tmp_path / "out")
    assert set(threading.enumerate()) - before == set()


def test_an_engine_that_dies_ends_the_run_with_its_error_and_the_same_command_resumes(corpus, tmp_path):
    with pytest.raises(EngineError, match="RuntimeError: CUDA error: an illegal memory access"):
        run(corpus, tmp_path / "out", executor=LocalExecutor(LOCAL, DiesAtThird))
    done = run(corpus, tmp_path / "out")
    assert done["rows"]["planned"] == 90
    check(tmp_path / "out")


def test_an_engine_that_stalls_ends_the_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("capsfusion_ray.run.engine_loop.STOP_S", 0.1)
    with pytest.raises(EngineError, match=r"the engine stalled: one step took longer than engine\.stall_s=0\.5"):
        run(corpus, tmp_path / "out", "engine.stall_s=0.5", executor=LocalExecutor(LOCAL, Hangs))


def test_a_bug_keeps_its_traceback_and_names_its_unit(corpus, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("laion_2b")

    monkeypatch.setattr("capsfusion_ray.run.unit_fuser.with_generations", broken)
    with pytest.raises(KeyError) as bug:
        run(corpus, tmp_path / "out")
    assert bug.value.__notes__[0].startswith("This happened in unit ")


def test_one_process_holds_one_engine():
    executor = LocalExecutor(ClusterConfig(kind="local", max_actors=4))
    assert executor.resolve_pool(EngineConfig(kind="echo"), 100).max_actors == 1
    with pytest.raises(ConfigError, match=r"cluster\.min_actors=2 with cluster\.kind=local"):
        LocalExecutor(ClusterConfig(kind="local", min_actors=2))


def test_the_demo_captions_pass_through_every_stage_and_the_accounting_closes(tmp_path):
    done = run(ROOT / "examples/captions", tmp_path / "out", "source.passthrough=[WIDTH]", "unit.rows=40")
    assert done["rows"]["planned"] == check(tmp_path / "out")["planned"] == 325
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert "part-00003.parquet" in json.dumps(manifest), "the unreadable shard is named"
    for reason in ("null_caption", "empty_caption", "invalid_utf8", "unparsable"):
        assert done["rejects"].get(reason), f"the demo's {reason} rows must be rejected by that name"
