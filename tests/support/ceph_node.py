"""A real object store of one node: Ceph's monitor, one OSD and radosgw, on 127.0.0.1, as this user.

Debian's packages radosgw, ceph-mon and ceph-osd are all it takes. The daemons are children of this process, in the
foreground: they end by pid, and everything they wrote lies in one folder.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moto_server import KEYS
from ports import free_port

USER = "captions"
DISK_BYTES = 8 << 30  # a sparse file: what is stored is what it takes
PATIENCE_S = 300  # for each daemon; ten seconds undisturbed

# One replica, on one disk; no placement groups to spare, because each pool of radosgw's takes some.
CONFIG = """
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
ms_bind_msgr1 = false
keyring = {folder}/keyring
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
pid_file = {folder}/$name.pid
crash_dir = {folder}
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
mon_data = {folder}/mon
mon_data_avail_crit = 0
osd_data = {folder}/osd
osd_objectstore = bluestore
bluestore_block_size = {disk_bytes}
osd_memory_target = 1073741824
osd_class_load_list = *
osd_class_default_list = *
[client.rgw]
rgw_data = {folder}
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_thread_pool_size = 64
rgw_run_sync_thread = false
"""


@contextmanager
def ceph_node(folder: Path) -> Iterator[str]:
    """Its URL, for the keys of moto_server.KEYS. `folder`: an absent one, which grows to what is stored and some; the caller's to delete."""
    port, mon_port = free_port(), free_port()
    for name in ("mon", "osd"):
        (folder / name).mkdir(parents=True)
    config, keyring, monmap = folder / "ceph.conf", folder / "keyring", folder / "monmap"
    fsid = str(uuid.uuid4())
    config.write_text(CONFIG.format(fsid=fsid, folder=folder, port=port, mon_port=mon_port, disk_bytes=DISK_BYTES))

    def run(*command: str, given: str | None = None) -> str:
        return _run(config, *command, given=given)

    def key(name: str, *caps: str) -> None:
        words = [word for cap in caps for word in ("--cap", *cap.split(" ", 1))]
        _run(None, "ceph-authtool", str(keyring), "--gen-key", "-n", name, *words)

    _run(None, "ceph-authtool", str(keyring), "--create-keyring")
    key("mon.", "mon allow *")
    key("client.admin", "mon allow *", "osd allow *")
    key("client.rgw", "mon allow rw", "osd allow rwx")
    _run(None, "monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", str(monmap))
    run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monmap))
    with ExitStack() as daemons:

        def start(answers: Callable[[], bool], *command: str) -> None:
            log = folder / f"{command[0]}.out"
            with log.open("wb") as out:
                process = subprocess.Popen([*command, "-c", str(config), "-f"], stdout=out, stderr=out)
            daemons.callback(_end, process)
            until = time.monotonic() + PATIENCE_S
            while not answers():
                assert process.poll() is None, (
                    f"{command[0]} ended with {process.returncode}: {log.read_text(errors='replace')[-2000:]}"
                )
                assert time.monotonic() < until, f"{command[0]} does not come up, see {folder}"
                time.sleep(0.2)

        start(lambda: _listens(mon_port), "ceph-mon", "-i", "a")
        osd, secret = str(uuid.uuid4()), run("ceph-authtool", "--gen-print-key").strip()
        run("ceph", "osd", "new", osd, "0", "-i", "-", given=json.dumps({"cephx_secret": secret}))
        with keyring.open("a") as keys:
            keys.write(f"[osd.0]\n\tkey = {secret}\n")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        start(lambda: json.loads(run("ceph", "osd", "stat", "-f", "json"))["num_up_osds"] == 1, "ceph-osd", "-i", "0")
        start(lambda: _listens(port), "radosgw", "-n", "client.rgw")
        run(
            "radosgw-admin",
            "-n",
            "client.rgw",
            "user",
            "create",
            f"--uid={USER}",
            "--display-name=of the tests",
            f"--access-key={KEYS['key']}",
            f"--secret={KEYS['secret']}",
        )
        yield f"http://127.0.0.1:{port}"


def _run(config: Path | None, *command: str, given: str | None = None) -> str:
    words = [command[0], *(["-c", str(config)] if config else []), *command[1:]]
    done = subprocess.run(words, input=given, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, f"{' '.join(words)}: exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of it is kept: SIGKILL, which no starved machine takes minutes to follow."""
    process.kill()
    process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0
