"""What a store promises, on a local folder, on an S3 server and on another fsspec store."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moto_server import PAGE_KEYS

from capsfusion_ray.errors import StorageError
from capsfusion_ray.storage import Store, StoredFile, StoreRefused


def test_reads_back_what_was_written(store: Store) -> None:
    store.put("a/b.bin", b"one")
    store.put("a/b.bin", b"two")
    assert store.get("a/b.bin") == b"two"
    assert store.exists("a/b.bin")
    assert not store.exists("a/c.bin")
    assert not store.exists("a")
    with store.open_input("a/b.bin") as file:
        file.seek(1)
        assert file.read() == b"wo"
    assert [store.get_range("a/b.bin", *span) for span in ((0, 3), (1, 2), (2, 2))] == [b"two", b"w", b""]
    with pytest.raises(StorageError, match="2 of the 9 bytes from 1 on came"):
        store.get_range("a/b.bin", 1, 10)
    with pytest.raises(FileNotFoundError):
        store.get_range("a/c.bin", 0, 1)


def test_first_writer_wins_and_the_second_learns_it_lost(store: Store) -> None:
    assert store.put_if_absent("_units/u.parquet", b"first") is True
    assert store.put_if_absent("_units/u.parquet", b"second") is False
    assert store.get("_units/u.parquet") == b"first"


def test_repeating_a_put_whose_answer_was_lost_counts_as_created(store: Store) -> None:
    """A store without conditional writes cannot know that the object is ours."""
    store.put("u", b"mine")
    assert store.put_if_absent("u", b"mine") is store.conditional_put
    assert store.get("u") == b"mine"


def test_only_a_local_folder_and_s3_have_conditional_writes(store: Store) -> None:
    assert store.conditional_put is not store.root.startswith("memory")


def test_of_many_writers_at_once_exactly_one_wins(store: Store) -> None:
    if not store.conditional_put:
        pytest.skip("documented: this kind of store cannot promise it")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.put_if_absent("u", b"%d" % i * 1000), range(8)))
    assert sum(won) == 1
    assert store.get("u") == b"%d" % won.index(True) * 1000


def test_compare_and_swap_refuses_a_stale_etag(store: Store) -> None:
    assert store.get_with_etag("manifest.json") is None
    first = store.put_if_match("manifest.json", b"1", None)
    assert first
    assert store.put_if_match("manifest.json", b"x", None) is None
    data, etag = store.get_with_etag("manifest.json") or (b"", "")
    assert (data, etag) == (b"1", first)
    second = store.put_if_match("manifest.json", b"2", etag)
    assert second
    assert second != first
    assert store.put_if_match("manifest.json", b"3", etag) is None
    assert store.get("manifest.json") == b"2"
    assert store.put_if_match("absent.json", b"1", etag) is None


def _count_up(store: Store, times: int) -> None:
    for _ in range(times):
        while True:
            data, etag = store.get_with_etag("n") or (b"", "")
            # With the writer's name in it: equal bytes of two writers would count as written by both.
            if store.put_if_match("n", b"%d by %d" % (int(data.split()[0]) + 1, os.getpid()), etag):
                break


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_no_update_is_lost_between_processes(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "local":
        store = Store(str(tmp_path))
    else:
        store = Store(f"s3://{request.getfixturevalue('bucket')}/r", request.getfixturevalue("s3_options"))
    store.put("n", b"0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count_up, args=(store, 10)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(500)
        assert worker.exitcode == 0
    assert store.get("n").startswith(b"20 ")


def test_lists_a_folder_recursively_and_sorted_without_temporary_names(store: Store) -> None:
    for path in ("b/z.parquet", "b/a.parquet", "bb/x.parquet", "top.json", "b/.hidden.parquet", ".tmp/x.parquet"):
        store.put(path, b"xyz")
    assert [f.path for f in store.list()] == ["b/a.parquet", "b/z.parquet", "bb/x.parquet", "top.json"]
    assert [f.path for f in store.list("b")] == ["b/a.parquet", "b/z.parquet"]
    assert [f.size for f in store.list("b")] == [3, 3]
    assert [f.path for f in store.list("top.json")] == ["top.json"]
    assert store.list("absent") == []


def test_deleting_an_absent_object_is_no_error(store: Store) -> None:
    store.put("a", b"1")
    store.delete(["a", "never/was"])
    assert store.list() == []


def test_reading_an_absent_object_gives_its_whole_url(store: Store) -> None:
    for read in (store.get, store.open_input):
        with pytest.raises(FileNotFoundError, match=r"root/none\.json"):
            read("none.json")


def test_a_pickled_store_works_in_another_process(store: Store) -> None:
    store.put("a", b"1")
    if not store.root.startswith("memory"):  # that one exists in this process only
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.map(store.get, ["a"]) == [b"1"]
    assert pickle.loads(pickle.dumps(store)).get("a") == b"1"


def test_probe_leaves_nothing_behind(store: Store) -> None:
    store.check_writable("_run")
    assert store.list() == []


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a//b", "./a"])
def test_paths_cannot_leave_the_root(tmp_path: Path, path: str) -> None:
    with pytest.raises(StoreRefused):
        Store(str(tmp_path)).put(path, b"")


# ---------------------------------------------------------------- local


def _write_until_killed(root: str) -> None:
    store = Store(root)
    for i in range(10**9):
        store.put_if_absent(f"u{i}.parquet", b"x" * 3_000_000)


def test_a_writer_killed_at_any_moment_leaves_only_whole_files(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=_write_until_killed, args=(str(tmp_path),))
    writer.start()
    while not list(tmp_path.glob("*.parquet")):
        time.sleep(0.01)
    time.sleep(0.1)
    writer.kill()
    writer.join()
    assert {f.stat().st_size for f in tmp_path.glob("*.parquet")} == {3_000_000}
    (tmp_path / f".u.parquet.{'0a' * 16}.tmp").write_bytes(b"text of a killed writer")
    (tmp_path / "mine").mkdir()
    users = [tmp_path / "mine" / ".draft.tmp", tmp_path / ".u.parquet.abc.tmp"]
    for file in users:
        file.write_bytes(b"a file of the user, who keeps others in this folder")
    (tmp_path / ".cache.tmp").mkdir()
    store = Store(str(tmp_path))
    assert store.delete_leftovers(older_than_s=3600) == 0
    assert store.delete_leftovers(older_than_s=0) >= 1
    assert set(tmp_path.rglob(".*.tmp")) == {*users, tmp_path / ".cache.tmp"}


def test_a_dangling_link_is_listed_and_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/up").symlink_to(tmp_path)
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    assert Store(str(tmp_path)).list() == [StoredFile("gone.parquet", 0)]


@pytest.fixture
def another_user() -> Iterator[Path]:
    """A folder that this user may read but not write. Root changes to another user, because root may do everything."""
    folder = Path(tempfile.mkdtemp(prefix="capsfusion-readonly-"))
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield folder
        os.seteuid(0)
    else:
        yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder_is_refused_by_name(another_user: Path) -> None:
    with pytest.raises(StoreRefused, match=f"{another_user.name}.*Permission denied"):
        Store(str(another_user / "out")).check_writable("_run")


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(StoreRefused, match="out"):
        Store(str(tmp_path / "out")).check_writable("_run")


def test_relative_roots_hold_in_workers_with_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("out")
    monkeypatch.chdir("/")
    store.put("a", b"")
    assert (tmp_path / "out/a").exists()


# ---------------------------------------------------------------- s3


def test_lists_more_than_one_page(bucket: str, s3_options: dict[str, str], s3_client) -> None:
    for i in range(3 * PAGE_KEYS + 1):
        s3_client.put_object(Bucket=bucket, Key=f"r/u/{i:05d}", Body=b"")
    assert s3_client.list_objects_v2(Bucket=bucket)["KeyCount"] == PAGE_KEYS, "the server does page"
    assert len(Store(f"s3://{bucket}/r", s3_options).list("u")) == 3 * PAGE_KEYS + 1


def test_an_absent_bucket_is_refused_by_name(s3_options: dict[str, str]) -> None:
    store = Store("s3://no-such-bucket-here/out", s3_options)
    for act in (lambda: store.list(), lambda: store.check_writable("_run")):
        with pytest.raises(StoreRefused, match="'no-such-bucket-here' does not exist"):
            act()


def test_missing_credentials_are_refused_with_the_way_out(
    bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreRefused, match=r"no credentials.*storage\.anon"):
        Store(f"s3://{bucket}/out", {"endpoint_url": s3_endpoint}).list()


def test_secrets_stay_out_of_repr_and_errors(tmp_path: Path) -> None:
    store = Store(str(tmp_path), {"secret": "S3CR3T"})
    assert "S3CR3T" not in repr(store)
    with pytest.raises(FileNotFoundError) as caught:  # as from a store that repeats the secret in its message
        store.get("echo-S3CR3T.json")
    assert "S3CR3T" not in str(caught.value)


def test_stores_of_a_process_with_the_same_options_share_one_client() -> None:
    """Each task of a run unpickles a Store of its own, and a client costs a second of CPU."""
    options = {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s", "region": "us-east-1"}
    one, same, other = (
        Store(f"s3://b/{i}", {**options, **more}).backend.fs for i, more in enumerate(({}, {}, {"key": "another"}))
    )
    assert one is same
    assert one is not other


def test_an_unknown_s3_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(StoreRefused, match=r"'endpoint'.*endpoint_url"):
        Store("s3://b/out", {"endpoint": "http://x"}).list()


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(StoreRefused, match="nosuch://x"):
        Store("nosuch://x/y").list()
