"""The lease of an output: only its holder may compact and publish. One object, renewed by compare-and-swap.

Commits need no lease: they are put-if-absent, so any number of drivers may commit. Clocks of two machines are never compared. A
lease has ended when its object did not change for TTL_S while this driver watched it, when its holder released it, or when its
holder was a process of this machine that does not exist any more. Knows the store only.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from capsfusion_ray.dataset.layout import LEASE
from capsfusion_ray.errors import ConfigError, LeaseLost, StorageError
from capsfusion_ray.storage import Store, StoreRefused, decode_note, encode_note

log = logging.getLogger(__name__)
TTL_S = 60.0
OUTAGE_S = 900.0  # after so long without a heartbeat the run stops; until then its compactions wait
BEATS_PER_TTL = 4
_WATCHES_PER_TTL = 20


@dataclass(frozen=True)
class Holder:
    """One driver process. `machine` is empty where other processes cannot tell whether it is alive (no /proc)."""

    id: str
    host: str
    pid: int
    machine: str
    started: str
    since: str
    beat: int = 0
    released: bool = False

    @classmethod
    def me(cls) -> Holder:
        """This process, as the holder of a new lease."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), _machine(), _started(os.getpid()), since)

    @property
    def over(self) -> bool:
        """True if it was released, or if its process ran on this machine and does not exist any more."""
        gone = bool(self.machine) and self.machine == _machine() and _started(self.pid) != self.started
        return self.released or gone

    def to_bytes(self) -> bytes:
        return encode_note(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder:
        return cls(**decode_note(data))


def _machine() -> str:
    """Equal for two processes exactly if they see each other's pids: same boot, same pid namespace, same host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When the process started, in kernel ticks since boot; empty where it does not exist. A reused pid has another value."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]  # a zombie runs no code any more


class Lease:
    """Held while used as a context manager.

    `takeover`: take the lease from a holder that is alive; that driver stops before its next compaction. `wait_s`: how many
    seconds `with` waits for a holder that is alive before it raises ConfigError; to find out whether it is alive takes up to
    `ttl_s` seconds more. `ttl_s`: without a heartbeat for so long the lease has ended. `outage_s`: see OUTAGE_S.
    """

    def __init__(
        self,
        store: Store,
        takeover: bool = False,
        wait_s: float = 0.0,
        ttl_s: float = TTL_S,
        outage_s: float = OUTAGE_S,
    ) -> None:
        self._store, self._takeover, self._wait_s, self._ttl_s = store, takeover, wait_s, ttl_s
        self._outage_s = outage_s
        self._holder = Holder.me()
        self._etag = ""
        self._lost = ""
        self._renewed = 0.0
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._acquire()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self._thread.join()
        if not self._lost:
            try:
                self._put(dataclasses.replace(self._holder, released=True), self._etag)
            except (StorageError, StoreRefused) as error:  # it ends by itself after ttl_s
                log.warning("lease not released: %s", error)

    @property
    def id(self) -> str:
        """The id of this driver: no other driver ever has the same."""
        return self._holder.id

    def check(self) -> None:
        """Return when this driver certainly holds the lease. Waits while the store accepts no heartbeat.

        Raises LeaseLost if another driver took this output over, or if the store accepted no heartbeat for `outage_s`.
        """
        while not self._lost and time.monotonic() - self._renewed > self._ttl_s * (1 - 1 / BEATS_PER_TTL):
            time.sleep(self._ttl_s / _WATCHES_PER_TTL)
        if self._lost:
            raise LeaseLost(f"{self._store.url(LEASE)}: {self._lost}; this driver stops, and all commits are kept")

    def _acquire(self) -> None:
        patience = time.monotonic() + self._wait_s
        while True:
            found = self._store.get_with_etag(LEASE)
            holder = self._living_holder(*found) if found and not self._takeover else None
            if holder is not None:
                self._refuse_or_wait(holder, patience - time.monotonic())
            elif self._put(self._holder, found[1] if found else None):
                return

    def _refuse_or_wait(self, holder: Holder, left_s: float) -> None:
        if left_s > 0:
            log.info(
                "%s: waiting %.0f s more for the driver on %s, pid %d",
                self._store.root,
                left_s,
                holder.host,
                holder.pid,
            )
            return
        raise ConfigError(
            f"{self._store.root}: another driver works on this output ({holder.host}, pid {holder.pid}, since "
            f"{holder.since}); give lease_wait_s=600 to wait for it, or takeover=true to stop it"
        )

    def _living_holder(self, data: bytes, etag: str) -> Holder | None:
        """The holder as soon as its heartbeat is seen; None once the lease was released, or was not renewed for ttl_s.

        Both seconds and looks at the object are counted: while this process itself is suspended, time passes that says
        nothing about the holder.
        """
        holder = Holder.from_bytes(data)
        if holder.over:
            return None
        log.info(
            "%s is held by %s, pid %d; watching it for %.0f s",
            self._store.url(LEASE),
            holder.host,
            holder.pid,
            self._ttl_s,
        )
        until, looks = time.monotonic() + self._ttl_s, 0
        while time.monotonic() < until or looks < _WATCHES_PER_TTL:
            time.sleep(self._ttl_s / _WATCHES_PER_TTL)
            now, looks = self._store.get_with_etag(LEASE), looks + 1
            if now is None or now[1] != etag:
                return None if now is None or Holder.from_bytes(now[0]).over else holder
        return None

    def _put(self, holder: Holder, etag: str | None) -> bool:
        # The time of the request, not of its answer, which may be late: others count from when the object was written.
        asked = time.monotonic()
        new = self._store.put_if_match(LEASE, holder.to_bytes(), etag)
        if new is not None:
            self._holder, self._etag, self._renewed = holder, new, asked
        return new is not None

    def _beat(self) -> None:
        while not self._leave.wait(self._ttl_s / BEATS_PER_TTL):
            try:
                if not self._put(dataclasses.replace(self._holder, beat=self._holder.beat + 1), self._etag):
                    self._lost = "another driver took this output over"
                    break
            except (StorageError, StoreRefused) as error:  # credentials that have expired may be renewed
                log.warning("heartbeat not written: %s", error)
            silent_s = time.monotonic() - self._renewed
            if silent_s > self._outage_s:
                self._lost = f"no heartbeat could be written for {silent_s:.0f} s"
                break
        if self._lost:
            log.error("lease lost: %s", self._lost)
