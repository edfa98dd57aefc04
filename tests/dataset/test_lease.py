"""One driver at a time holds the lease: others are refused, wait, or take it over, and the old holder finds out."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from capsfusion_ray.dataset import lease as lease_module
from capsfusion_ray.dataset.layout import LEASE
from capsfusion_ray.dataset.lease import Holder, Lease
from capsfusion_ray.errors import ConfigError, LeaseLost, StorageError
from capsfusion_ray.storage import Store, StoreRefused

TTL_S = 2.0  # where a test waits for its end
LIVING_TTL_S = 16.0  # where a holder must stay alive: a heartbeat every 4 s succeeds on a busy machine, too
ROOT = Path(__file__).resolve().parents[2]


def test_a_second_driver_is_refused_while_the_first_is_alive(store):
    with Lease(store, ttl_s=LIVING_TTL_S) as first:
        refused = pytest.raises(ConfigError, match=rf"pid {os.getpid()}.*takeover=true")
        with refused, Lease(store, ttl_s=LIVING_TTL_S):
            pass
        first.check()
    with Lease(store, ttl_s=LIVING_TTL_S):  # released, so nobody waits
        pass


@pytest.mark.parametrize("ends", ["released", "silent"])
def test_a_driver_that_waits_takes_over_when_the_other_one_ends(store, monkeypatch, caplog, ends):
    there = Holder("them", "far.example", 1, "another machine", "1", "2026-01-01T00:00:00Z")
    store.put(LEASE, there.to_bytes())
    beats = iter([1, 2, 3])

    def meanwhile(_seconds):
        beat = next(beats, None)
        if beat or ends == "released":
            store.put(LEASE, dataclasses.replace(there, beat=beat or 4, released=not beat).to_bytes())

    clock = SimpleNamespace(monotonic=time.monotonic, strftime=time.strftime, gmtime=time.gmtime, sleep=meanwhile)
    monkeypatch.setattr(lease_module, "time", clock)
    caplog.set_level("INFO")
    with Lease(store, wait_s=600, ttl_s=TTL_S) as second:
        second.check()
    assert caplog.text.count("s more for the driver on far.example, pid 1") == 3


def test_takeover_stops_the_first(store):
    with Lease(store, ttl_s=LIVING_TTL_S) as first, Lease(store, takeover=True, ttl_s=LIVING_TTL_S) as second:
        with pytest.raises(LeaseLost, match="took this output over"):
            wait_for_loss(first)
        second.check()


def wait_for_loss(lease):
    until = time.monotonic() + 10 * LIVING_TTL_S
    while time.monotonic() < until:
        lease.check()
        time.sleep(0.05)


def test_a_holder_on_another_machine_without_heartbeats_loses_the_lease(store):
    there = Holder("them", "far.example", 1, "another machine", "1", "2026-01-01T00:00:00Z")
    store.put(LEASE, there.to_bytes())
    began = time.monotonic()
    with Lease(store, ttl_s=TTL_S):
        assert time.monotonic() - began >= TTL_S


HOLD = """
import sys, time
from capsfusion_ray.dataset.lease import Lease
from capsfusion_ray.storage import Store
with Lease(Store(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_at_once(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    with Lease(Store(str(tmp_path))):
        assert time.monotonic() - began < 30, "TTL_S is 60, and it was not waited for"


@pytest.mark.parametrize("error", [StorageError, StoreRefused])
def test_the_lease_is_lost_after_outage_s_without_a_heartbeat(tmp_path, monkeypatch, error):
    store = Store(str(tmp_path))
    with Lease(store, ttl_s=TTL_S, outage_s=TTL_S) as lease:

        def fail(*_):
            raise error("the store is gone, or the credentials have run out")

        monkeypatch.setattr(store, "put_if_match", fail)
        with pytest.raises(LeaseLost, match="no heartbeat"):
            wait_for_loss(lease)


def test_check_waits_while_the_store_accepts_no_heartbeat(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    with Lease(store, ttl_s=TTL_S) as lease:
        put, over = store.put_if_match, time.monotonic() + 1.5 * TTL_S

        def fail(*args):
            if time.monotonic() < over:
                raise StorageError("the store is away")
            return put(*args)

        monkeypatch.setattr(store, "put_if_match", fail)
        time.sleep(TTL_S)
        lease.check()
        assert time.monotonic() >= over, "before, this driver could not know whether it held the lease"
