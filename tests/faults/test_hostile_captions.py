"""Captions are text that anyone wrote on the web: no file is named by them, and no shell, terminal or browser executes them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capsfusion_ray.config import OutputConfig, VerifyConfig
from capsfusion_ray.core.accounting import summarise
from capsfusion_ray.core.columns import part_schema
from capsfusion_ray.core.plan import Plan, PlannedShard
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.core.unit_batch import UnitBatch
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.export import ExportConfig, export
from capsfusion_ray.dataset.layout import MANIFEST, REPORT
from capsfusion_ray.dataset.manifest import assemble
from capsfusion_ray.dataset.plan_files import write_plan
from capsfusion_ray.dataset.unit_files import commit
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.errors import UsageError
from capsfusion_ray.reports.job import ReportConfig, report
from capsfusion_ray.reports.terminal import show
from capsfusion_ray.storage import Store

COLUMN = "$(touch pwned)';touch pwned;'"  # a passthrough column of numbers, whose name is in the export's shell script
PARTITION = "site"  # another one, whose values name folders

HOSTILE = {
    "html": "</script><script>alert(1)</script><svg onload=alert(1)>&lt;b&gt; <!-- ]]>",
    "attribute": "\" onmouseover=\"alert(1)' onfocus='alert(1) javascript:alert(1)",
    "template": "%SCRIPT% %DATA% {{7*7}} ${7*7} <%= 7 %>",
    "ansi": "\x1b[2J\x1b[31mred\x1b]0;title\x07\x1b]8;;http://x/\x1b\\link\x1bPq#0\x1b\\\x9b31m\x9d0;t\x9c",
    "backspaces": "safe\b\b\b\brm -rf\r$ \x7f\x0b\x0c",
    "bidi": "\u202egnp.exe\u202c \u2066x\u2069 \ufeff\u200e",
    "csv": "=cmd|'/c calc'!A0",
    "csv_plus": "+1+1\t@SUM(1+1)\n-2+3",
    "path": "../../../../etc/passwd",
    "path_absolute": "/etc/passwd",
    "path_windows": "..\\..\\con.parquet:stream",
    "dot": ".",
    "dots": "..",
    "nul": "a\x00b\x00.parquet",
    "shell": "`touch pwned` $(touch pwned) ; touch pwned #",
    "glob": "*[!a]?{a,b}~",
    "rich": "[bold red]x[/] [link=http://x]y[/link] :bomb:",
    "markdown": "| a | b |\n---\n# title ![x](http://x/y.png)",
    "yaml": "---\nlicense: mit\n!!python/object/apply:os.system ['touch pwned']",
    "pickle": "\x80\x04\x95cos\nsystem\n(S'touch pwned'\ntR.",
    "hive": "site=other/__HIVE_DEFAULT_PARTITION__",
    "separator": "\u2028\u2029\x85",
}
NAMES = list(HOSTILE)


@dataclass
class Finished:
    output: OutputConfig
    store: Store
    rows: int


def part_of(unit: WorkUnit) -> pa.Table:
    """One row per text, which is in every text column; every third row is rejected."""
    fields = ((COLUMN, "int64"), (PARTITION, "string"))
    rows = [
        {
            "image_url": text,
            "laion_2b": text,
            "laion_coco": f"A photo, {text}",
            "capsfusion": f"Fused: {text}",
            "row_id": f"{unit.path}:{unit.start + i}",
            "flags": ["lost_entity"] if i % 2 else [],
            COLUMN: i,
            PARTITION: text,
            "outcome": "rejected" if i % 3 == 0 else "fused",
            "reason": "repetition" if i % 3 == 0 else None,
            "detail": text if i % 3 == 0 else "",
            "prompt_tokens": 9,
            "output_tokens": 4,
        }
        for i, text in enumerate(HOSTILE.values())
    ]
    return pa.Table.from_pylist(rows, schema=part_schema(fields))


@pytest.fixture(scope="module", params=["shard", PARTITION])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two units of a shard with a hostile name, partitioned by group of shards and by the hostile column."""
    root = tmp_path_factory.mktemp("home") / "work" / "out"
    store, output = Store(str(root)), OutputConfig(str(root), partition_by=request.param)
    path, count = "\x1b[31mshard <img src=x>\n=1+1.parquet", len(HOSTILE)
    units = tuple(WorkUnit(f"u{i}", path, i * count, (i + 1) * count, "g00000") for i in range(2))
    fields = ((COLUMN, "int64"), (PARTITION, "string"))
    base = {f"output.{key}": getattr(output, key) for key in ("target_file_mb", "target_file_rows", "partition_by")}
    plan = Plan(1, base, count, fields, units, (PlannedShard(path, "c", 2 * count, "g00000", HOSTILE["ansi"]),))
    write_plan(store, plan)
    for unit in units:
        part = part_of(unit)
        commit(store, part, summarise(UnitBatch(unit, part), part))
    entry = compact_group(store, "g00000", 1, units, fields, output)
    store.put(MANIFEST, assemble([plan], [entry], [{"revision": 1}]).to_bytes())
    return Finished(output, store, 2 * count)


def test_every_text_is_stored_unchanged_and_the_accounting_closes(finished: Finished) -> None:
    verify(VerifyConfig(finished.output, deep=True))
    raw = []
    for file in [*finished.store.list("data"), *finished.store.list("rejected")]:
        raw += pq.read_table(io.BytesIO(finished.store.get(file.path)), partitioning=None)["laion_2b"].to_pylist()
    assert sorted(raw) == sorted(list(HOSTILE.values()) * 2)


def test_no_text_becomes_a_path(finished: Finished) -> None:
    home = Path(finished.output.path).parent.parent
    assert [p.name for p in home.iterdir()] == ["work"]
    assert [p.name for p in (home / "work").iterdir()] == ["out"]
    names = [name for _, folders, files in os.walk(home) for name in (*folders, *files)]
    for name in names:
        assert re.fullmatch(r"[\w=%. \-~]+", name, re.ASCII), (
            f"{name!r}: a name must be valid in any file system and shell"
        )
        assert name.strip(" .") == name, "Windows removes a space or dot at the end of a name"
    if finished.output.partition_by == PARTITION:
        folders = [p for p in Path(finished.output.path, "data").iterdir() if p.is_dir()]
        assert len(folders) == sum(i % 3 != 0 for i in range(len(HOSTILE))), "one folder per value"


def test_the_report_contains_them_as_data_only(finished: Finished) -> None:
    report(ReportConfig(finished.output, rows_per_reason=50))
    page = Path(finished.output.path, REPORT).read_text("utf-8")
    assert len(re.findall(r"<script", page, re.IGNORECASE)) == 2, "the page's own"
    assert not re.search(r"<(?:svg|img|iframe|object|embed|link|base)\b", page.partition("<body")[2], re.IGNORECASE)
    assert "default-src 'none'" in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert {row["raw"] for row in data["rows"]} == set(HOSTILE.values())
    assert not {c for c in page if c < " "} - {"\n"}, "the file has no control character of the data"
    script = page.rpartition("<script>")[2]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_terminal_shows_them_and_executes_none(
    finished: Finished, stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = stream()
    show(finished.output.path, 200, out)
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()) if stream is Terminal else out.getvalue()
    assert {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} <= {"\n"}
    if finished.output.partition_by == "shard":  # with the other partition there are more files than it reads
        assert "=cmd|'/c calc'!A0" in text.replace("\n", ""), "the text is shown"
        assert "[bold red]x[/]" in text


def test_an_export_executes_none_of_them(finished: Finished, tmp_path: Path) -> None:
    to, tools = tmp_path / "export", tmp_path / "bin"
    done = export(ExportConfig(finished.output, to=str(to)))
    assert done["exported"] == finished.rows - 2 * sum(i % 3 == 0 for i in range(len(HOSTILE)))
    names = sorted(str(p.relative_to(to)) for p in to.rglob("*") if p.is_file())
    assert all(re.fullmatch(r"data/train-\d{5}-of-\d{5}\.parquet|README\.md|img2dataset\.sh", name) for name in names)
    card = (to / "README.md").read_text("utf-8")
    assert not [text for text in HOSTILE.values() if len(text) > 2 and text in card], (
        "the card has counts and no captions"
    )
    tools.mkdir()
    (tools / "img2dataset").write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\n" "$a"; done\n')
    (tools / "img2dataset").chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"}
    ran = subprocess.run(["sh", "img2dataset.sh"], cwd=to, env=environment, capture_output=True, text=True, check=True)
    assert not list(tmp_path.rglob("pwned")), "the shell must not execute a column's name"
    assert COLUMN in ran.stdout


def test_a_partition_value_too_long_for_a_name_is_refused_clearly(finished: Finished, tmp_path: Path) -> None:
    unit = WorkUnit("u", "s.parquet", 0, len(HOSTILE), "g00000")
    fields = ((COLUMN, "int64"), (PARTITION, "string"))
    part = part_of(unit)
    at = part.schema.get_field_index(PARTITION)
    part = part.set_column(at, PARTITION, pa.array(["x" * 300] * part.num_rows))
    store, output = (
        Store(str(tmp_path)),
        dataclasses.replace(finished.output, path=str(tmp_path), partition_by=PARTITION),
    )
    commit(store, part, summarise(UnitBatch(unit, part), part))
    with pytest.raises(UsageError, match="File name too long; use a shorter output path or shorter partition value"):
        compact_group(store, "g00000", 1, [unit], fields, output)
    assert store.list("_units"), "the part stays"
