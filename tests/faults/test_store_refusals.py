"""A store that cannot be used is refused at the start, with its URL and the way out, and without any secret."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxy import FaultProxy, Faults

from capsfusion_ray.cli import EXIT_FAILED, EXIT_USAGE, run_job
from capsfusion_ray.config import FuseConfig, VerifyConfig
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.errors import StorageError
from capsfusion_ray.run.driver import fuse
from capsfusion_ray.storage import Store, StoreRefused

READ = ["s3:GetObject", "s3:ListBucket"]
WRITE = [*READ, "s3:PutObject", "s3:DeleteObject"]
Users = Callable[[list[str]], dict[str, str]]


def fuse_to(output: str, options: dict[str, str], tmp_path: Path) -> int:
    """Run the fuse command with a good input on such a store; it tests the store before it starts a cluster."""
    (tmp_path / "in.jsonl").write_text('{"image_url": "u", "laion_2b": "a", "laion_coco": "b"}\n' * 3)
    argv = ["engine.kind=echo", f"input.path={tmp_path / 'in.jsonl'}", f"output.path={output}"]
    return run_job(FuseConfig, fuse, argv + [f"output.storage.{key}={value}" for key, value in options.items()])


def missing_bucket(bucket: str, users: Users) -> tuple[str, dict[str, str]]:
    return "s3://no-such-bucket-here/out", users(WRITE)


def wrong_secret(bucket: str, users: Users) -> tuple[str, dict[str, str]]:
    return f"s3://{bucket}/out", {**users(WRITE), "secret": "Wr0ng-s3cret-of-somebody"}


def unknown_key(bucket: str, users: Users) -> tuple[str, dict[str, str]]:
    return f"s3://{bucket}/out", {**users(WRITE), "key": "AKIAIOSFODNN7UNKNOWN"}


def read_only(bucket: str, users: Users) -> tuple[str, dict[str, str]]:
    return f"s3://{bucket}/out", users(READ)


def no_credentials(bucket: str, users: Users) -> tuple[str, dict[str, str]]:
    return f"s3://{bucket}/out", {}


def unknown_option(bucket: str, users: Users) -> tuple[str, dict[str, str]]:
    return f"s3://{bucket}/out", {**users(WRITE), "acl": "private"}


@pytest.mark.parametrize(
    ("refusal", "way_out"),
    [
        (missing_bucket, "'no-such-bucket-here' does not exist; create it, or correct the path or endpoint_url"),
        (wrong_secret, "credentials not accepted (SignatureDoesNotMatch); check storage key and secret"),
        (unknown_key, "credentials not accepted (InvalidAccessKeyId); check storage key and secret"),
        (read_only, "access denied (AccessDenied); these credentials need permission to write here"),
        (no_credentials, "no credentials; give storage key and secret, set AWS_*"),
        (unknown_option, "unknown storage option 'acl'; s3 takes endpoint_url, key, secret"),
    ],
)
def test_a_store_that_refuses_stops_the_job_at_its_start(
    refusal: Callable[[str, Users], tuple[str, dict[str, str]]],
    way_out: str,
    bucket: str,
    server: str,
    guarded: Users,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    output, options = refusal(bucket, guarded)
    assert fuse_to(output, {"endpoint_url": server, "region": "us-east-1", **options}, tmp_path) == EXIT_USAGE
    out, err = capfd.readouterr()
    error = err[err.index("error: ") :]
    assert output in error
    assert way_out in error
    assert "Traceback" not in err
    for secret in (options.get("secret"), options.get("key")):
        assert not secret or secret not in out + err + caplog.text
    assert not out, "a program must not read anything as a result"


def test_credentials_that_may_write_are_not_refused(bucket: str, server: str, guarded: Users) -> None:
    """The refusals above could otherwise come from a server that refuses everyone."""
    Store(f"s3://{bucket}/out", {"endpoint_url": server, "region": "us-east-1", **guarded(WRITE)}).check_writable(
        "_run"
    )


def test_an_input_that_may_not_be_read_is_refused_by_its_url(
    bucket: str, server: str, guarded: Users, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"endpoint_url": server, "region": "us-east-1", **guarded(["s3:PutObject"])}
    argv = ["engine.kind=echo", f"input.path=s3://{bucket}/captions", f"output.path={tmp_path / 'out'}"]
    assert run_job(FuseConfig, fuse, argv + [f"input.storage.{k}={v}" for k, v in options.items()]) == EXIT_USAGE
    err = capfd.readouterr().err
    assert f"s3://{bucket}/captions" in err
    assert "access denied" in err
    assert options["secret"] not in err
    assert not (tmp_path / "out").exists()


def test_verify_of_a_store_that_refuses_reports_no_missing_rows(
    bucket: str, server: str, guarded: Users, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"endpoint_url": server, "region": "us-east-1", **guarded(WRITE), "secret": "Wr0ng-s3cret-of-somebody"}
    argv = [f"output.path=s3://{bucket}/out", *(f"output.storage.{key}={value}" for key, value in options.items())]
    assert run_job(VerifyConfig, verify, argv) == EXIT_USAGE
    out, err = capfd.readouterr()
    assert "check storage key and secret" in err
    assert "Wr0ng" not in out + err


@pytest.mark.parametrize("operation", ["PutObject", "GetObject", "HeadObject", "ListObjects", "DeleteObject"])
def test_expired_credentials_are_refused_at_once_by_every_request(
    proxy: FaultProxy, store: Store, calm: Store, operation: str
) -> None:
    """Nothing waits for minutes, as it does for a store that fails."""
    calm.put("u", b"1")
    calls: dict[str, Callable[[], object]] = {
        "PutObject": lambda: store.put_if_absent("v", b"1"),
        "GetObject": lambda: store.get("u"),
        "HeadObject": lambda: store.exists("u"),
        "ListObjects": lambda: store.list(),
        "DeleteObject": lambda: store.delete(["u"]),
    }
    proxy.inject(Faults(1.0, ("expired",), frozenset([operation])))
    with pytest.raises(
        StoreRefused, match=r"credentials not accepted \((ExpiredToken|400)\); check storage key and secret"
    ):
        calls[operation]()


def test_signatures_hold_through_the_proxy_of_these_tests(proxy: FaultProxy, store: Store, guarded: Users) -> None:
    signed = Store(store.root, {**store.options, **guarded(WRITE)})
    assert signed.put_if_absent("a/ü =+&.bin", b"1")
    assert signed.get("a/ü =+&.bin") == b"1"
    assert [file.path for file in signed.list("a")] == ["a/ü =+&.bin"]
    assert proxy.count("pass", "PutObject") == 1


# ------------------------------------------------------------------------------------------------ a full disk

DISK_BYTES = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip() if mounted else 'not root'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_that_leaves_nothing_half_written(small_disk: Path) -> None:
    store = Store(str(small_disk / "out"))
    store.put("old", b"old" * 1000)
    before, etag = store.get_with_etag("old") or (b"", "")
    filler = small_disk / "filler"
    filler.write_bytes(b"f" * (DISK_BYTES // 2))
    data = b"x" * (DISK_BYTES * 3 // 4)
    writes: dict[str, Callable[[], object]] = {
        "new": lambda: store.put_if_absent("new", data),
        "other": lambda: store.put("other", data),
        "old": lambda: store.put("old", data),
        "swapped": lambda: store.put_if_match("old", data, etag),
    }
    for write in writes.values():
        with pytest.raises(
            StorageError, match=rf"{small_disk}/out/\w+: cannot write it: No space left on device; free some"
        ):
            write()
    assert [file.path for file in store.list()] == ["old"]
    assert store.get("old") == before
    assert not list(small_disk.rglob(".*.tmp")), "the temporary files are removed, or the disk would stay full"
    filler.unlink()
    assert writes["new"]() is True
    assert store.get("new") == data


def test_a_job_on_a_full_disk_fails_and_can_be_repeated(
    small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"f" * 4096)
    assert fuse_to(str(small_disk / "out"), {}, tmp_path) == EXIT_FAILED, "no usage error: the same command continues"
    assert "No space left on device; free some" in capfd.readouterr().err
