"""Many holders share the lock or one has it alone; a closed lock lets nobody share it."""

import threading
import time

from capsfusion_ray.run.reader_writer_lock import ReaderWriterLock


def test_holders_share_it_and_an_exclusive_one_is_alone():
    lock, sharing, alone, seen = ReaderWriterLock(), [], [], []

    def share():
        for _ in range(50):
            with lock.shared():
                sharing.append(1)
                seen.append((len(sharing), len(alone)))
                sharing.pop()

    def take():
        for _ in range(20):
            with lock.exclusive():
                alone.append(1)
                seen.append((len(sharing), len(alone)))
                time.sleep(0.001)
                alone.pop()

    threads = [threading.Thread(target=target) for target in (share, share, share, take, take)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert all((shared == 0 and exclusive == 1) or exclusive == 0 for shared, exclusive in seen)


def test_close_waits_for_holders_and_lets_no_other_in():
    lock, came_in = ReaderWriterLock(), threading.Event()

    def late():
        with lock.shared():
            came_in.set()

    with lock.shared():
        assert not lock.close(0.05), "it is still held"
        threading.Thread(target=late, daemon=True).start()
        assert not came_in.wait(0.2)
    assert lock.close(5.0)
    assert not came_in.wait(0.2)
