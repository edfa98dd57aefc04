"""An engine of a running job does not start again: its actor tries again while the other actor fuses, until the cause is gone."""

import json
import shutil
import threading
import time

import psutil
import pytest
from drivers import resumable

from capsfusion_ray.models.location import locate
from capsfusion_ray.storage import Store

TWO_ACTORS = (
    "cluster.gpus_per_actor=0",
    "cluster.min_actors=2",
    "cluster.max_actors=2",
    "cluster.cpus_per_actor=1",
)
# Eight beams in two slots: even a fast machine needs longer for all captions than an actor needs for two starts.
SLOW = (
    "engine.dtype=float32",
    "engine.threads=1",
    "engine.slots=2",
    "decode.num_beams=8",
    "unit.rows=2",
    "input.limit=200",
)


@pytest.mark.timeout(3600)
def test_an_engine_that_does_not_start_again_is_tried_again_while_the_other_actor_fuses(corpus, tmp_path, driver):
    """SIGKILL to one of two actors after their model was moved away, as on a broken node; later the model is put back."""
    model, away, output = tmp_path / "model", tmp_path / "away", tmp_path / "out"
    shutil.copytree(locate(""), model)
    store = Store(str(output))
    words = (f"input.path={corpus}", f"output.path={output}", f"engine.model={model}", "engine.start_patience_s=120")
    run = driver.start("fuse", *words, *TWO_ACTORS, *SLOW)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(run.stderr))  # otherwise the pipe fills up and the run blocks
    reader.start()
    victim, _ = until(lambda: resumable(store) and both_fusing(driver), run, "both actors were fusing")

    model.rename(away)
    done = resumable(store)
    victim.kill()  # the run cannot end without this actor: the units that were sent to it wait for it
    second = until(lambda: failed_starts(store, 2), run, "the second failed start")
    assert "no such folder" in second[0]["error"]
    until(lambda: resumable(store) > done, run, "a commit of the other actor")
    away.rename(model)

    out = run.stdout.read()
    assert run.wait(600) == 0, "".join(said)[-3000:]
    reader.join()
    assert json.loads(out.splitlines()[-1])["rows"]["planned"] == 200
    assert "cannot start its engine" in "".join(said)
    assert not notes(store), "both engines are up at the end"
    driver.run("verify", f"output.path={output}", "deep=true")


def both_fusing(driver):
    """The two actors of the driver's own cluster, where both run a unit: Ray shows that in the title of a process."""
    found = [(process, process.info["cmdline"] or [""]) for process in psutil.process_iter(["name", "ppid", "cmdline"])]
    address = f"--gcs-address={driver.env['RAY_ADDRESS']}"
    [raylet] = [process.pid for process, words in found if process.info["name"] == "raylet" and address in words]
    title = "ray::MapWorker(MapBatches(FusionActor)).submit"
    actors = [process for process, words in found if process.info["ppid"] == raylet and words[0] == title]
    return actors if len(actors) == 2 else None


def notes(store):
    """The notes of the actors whose engines are not up."""
    found = [store.get_with_etag(file.path) for file in store.list("_run/starts") if not file.path.endswith("up.json")]
    return [json.loads(note[0]) for note in found if note]


def failed_starts(store, number):
    """The notes of actors that have failed at least `number` times in a row, with an error."""
    return [note for note in notes(store) if note["number"] >= number and note["error"]]


def until(seen, run, what):
    """Wait for `seen()`; what it returned. The run must not end before."""
    while not (found := seen()):
        assert run.poll() is None, f"the run ended before {what}"
        time.sleep(0.05)
    return found
