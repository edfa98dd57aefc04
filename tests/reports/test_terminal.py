"""What a terminal shows of a finished output, and that web captions in it stay text."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capsfusion_ray.cli import main
from capsfusion_ray.core.accounting import Counts
from capsfusion_ray.core.columns import DATA_FIELDS, REJECT_FIELDS
from capsfusion_ray.dataset.manifest import Manifest
from capsfusion_ray.errors import SourceError
from capsfusion_ray.reports.terminal import plain, show

ROOT = Path(__file__).parents[2]
EVIL = "[bold red]HOT[/] \x1b[31mred\x1b[0m \x1b]8;;https://images.example.com/\x07link\x1b]8;;\x07\x1b[2J \u202etxt\u202c\x9b31m"
BAD = b"caf\xe9 terrace"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write_output(root: Path, fused_rows: int = 12) -> Path:
    data, rejected = root / "data/shard=g00000", root / "rejected/shard=g00000"
    data.mkdir(parents=True)
    rejected.mkdir(parents=True)
    rows = [
        {
            "image_url": f"https://images.example.com/{i}.jpg",
            "laion_2b": EVIL if i == 0 else f"Lodge skillet no {i} chilli",
            "laion_coco": "A black pan with handle.",
            "capsfusion": f"{EVIL} pan" if i == 0 else f"The Lodge skillet no {i} is a wonderful black pan.",
            "row_id": f"part-00000.parquet:{i}",
            "flags": ["lost_entity"] if i == 1 else [],
        }
        for i in range(fused_rows)
    ]
    kept = {**rows[1], "capsfusion": rows[1]["laion_2b"], "row_id": "part-00000.parquet:kept"}
    pq.write_table(pa.Table.from_pylist([*rows, kept], pa.schema(DATA_FIELDS)), data / "part-00000.parquet")
    reasons = ["null_caption", "null_caption", "null_caption", "invalid_utf8", "cut_off"]
    table = pa.Table.from_pylist(
        [{**rows[0], "capsfusion": None, "reason": r, "detail": "laion_2b is null"} for r in reasons],
        pa.schema([*DATA_FIELDS, *REJECT_FIELDS]),
    )
    raw = pa.array([None, None, None, BAD, b"x"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(1, "laion_2b", raw), rejected / "part-00000.parquet")
    counts = Counts(
        planned=1234, fused=fused_rows, kept=1, rejected=5, reasons={"null_caption": 3, "invalid_utf8": 1, "cut_off": 1}
    )
    manifest = Manifest("f", {}, counts, {"part-00003.parquet": "no footer"}, (), (), ())
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    return root


def load_script(path: str) -> ModuleType:
    """A script as a module, without a new process."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(root: Path, stream: io.StringIO, count: int = 8) -> str:
    show(str(root), count, stream)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def test_a_pipe_gets_no_escapes_but_the_share_of_each_origin(tmp_path: Path) -> None:
    text = shown(write_output(tmp_path), io.StringIO())
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "\u202e" not in text
    assert "10 words: 4 from the raw caption, 3 from the synthetic caption, 3 from neither" in text
    assert "HOT" in text
    assert str(tmp_path) in text.replace("\n", "")


def test_a_terminal_gets_each_word_in_the_colour_of_its_origin(tmp_path: Path) -> None:
    text = shown(write_output(tmp_path), Terminal())
    assert "\x1b[94mLodge\x1b[0m" in text
    assert "\x1b[33mpan\x1b[0m" in text
    assert "\x1b[31mwonderful\x1b[0m" in text


def test_no_color_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(write_output(tmp_path), Terminal())
    assert "\x1b[94m" not in text
    assert "\x1b[33m" not in text
    assert "from the raw caption" in text


def test_hostile_captions_add_no_escape_of_their_own(tmp_path: Path) -> None:
    text = shown(write_output(tmp_path), Terminal(), count=20)
    assert "\x1b[2J" not in text
    assert "\x1b]8" not in text
    assert "\x9b" not in text
    assert "bold red]" in text, "terminal markup in a caption must stay text"


def test_rejects_with_different_reasons_come_first_and_invalid_utf8_is_shown(tmp_path: Path) -> None:
    text = shown(write_output(tmp_path), io.StringIO())
    rejects = text[text.index("Rejected, each") : text.index("Rows by outcome")]
    assert rejects.count("reason") - 1 == 3  # the heading says it once
    for reason in ("null_caption", "invalid_utf8", "cut_off"):
        assert reason in rejects
    assert "caf\ufffd terrace" in rejects
    assert "(null)" in rejects
    assert "laion_2b is null" in rejects


def test_count_flags_and_kept_rows(tmp_path: Path) -> None:
    root = write_output(tmp_path)
    few = shown(root, io.StringIO(), count=3)
    assert few.count("is a wonderful") == 3
    everything = shown(root, io.StringIO(), count=100)
    assert "part-00000.parquet:kept" not in everything
    assert "lost_entity" in everything


def test_counts_and_unreadable_shards(tmp_path: Path) -> None:
    text = shown(write_output(tmp_path), io.StringIO())
    assert "1,234" in text
    assert "null_caption 3" in text
    assert "unreadable shard: part-00003.parquet: no footer" in text


def test_an_unfinished_output_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"finish the output first: capsfusion fuse output\.path="):
        show(str(tmp_path), 8, io.StringIO())


def test_plain_keeps_the_joiners_that_scripts_need() -> None:
    assert plain("नमस्\u200dते \n 山") == "नमस्\u200dते 山"
    assert plain(b"\xff ok") == "\ufffd ok"
    assert len(plain("x" * 5000)) == 400


@pytest.mark.parametrize(
    ("argv", "code"), [([], 2), (["output.pth=x"], 2), (["count=0", "output.path=x"], 2), (None, 0)]
)
def test_doorway(tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str] | None, code: int) -> None:
    argv = [f"output.path={write_output(tmp_path)}", "count=2"] if argv is None else argv
    assert main(["show", *argv]) == code
    out, err = capsys.readouterr()
    assert ("error: " in err) == (code == 2)
    assert ("Rows by outcome" in out) == (code == 0)


def test_the_demo_shards_are_what_their_source_gives(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        load_script("examples/make_captions.py").main(tmp_path / folder)
    committed = ROOT / "examples/captions"
    names = sorted(p.name for p in committed.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "a").iterdir())
    for name in names:
        made = (tmp_path / "a" / name).read_bytes()
        assert made == (tmp_path / "b" / name).read_bytes()
        there = (committed / name).read_bytes()
        if name.endswith(".gz"):
            assert gzip.decompress(made) == gzip.decompress(there)
        elif name == "part-00003.parquet":
            with pytest.raises(pa.ArrowInvalid):
                pq.read_table(io.BytesIO(there))
        else:
            assert pq.read_table(io.BytesIO(made)).equals(pq.read_table(io.BytesIO(there)))


def test_the_demo_source_has_no_pair_twice_by_accident() -> None:
    lines = (ROOT / "examples/captions_source.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    assert len({p["image"] for p in pairs}) == len(pairs)
    wanted = [(p["raw"], p["synthetic"]) for p in pairs if "duplicate" not in p.get("note", "")]
    assert len(set(wanted)) == len(wanted) >= 300
