"""Tests that the pages agree with the program: files, targets, commands, keys, reasons and messages."""

import ast
import functools
import re
import runpy
import shlex
from pathlib import Path

import pytest

from capsfusion_ray import cli
from capsfusion_ray.config import parse_config, usage
from capsfusion_ray.config.keys import keys_of
from capsfusion_ray.core.types import Reason
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.run.submit import SubmitConfig

ROOT = Path(__file__).resolve().parents[1]


def test_the_configuration_page_is_generated_from_the_configs():
    made = runpy.run_path(str(ROOT / "docs/make_configuration.py"))["page"]()
    assert (ROOT / "docs/configuration.md").read_text("utf-8") == made, "run: python docs/make_configuration.py"


def test_the_map_of_files_in_the_readme_is_made_from_the_modules():
    made = runpy.run_path(str(ROOT / "docs/make_file_map.py"))["page"]()
    assert (ROOT / "README.md").read_text("utf-8") == made, "run: python docs/make_file_map.py"


def test_every_job_is_on_the_page_of_keys_and_has_help():
    assert set(JOBS) == {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")}
    for schema in JOBS.values():
        assert "=" in usage(schema)


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_every_file_and_target_that_a_page_names_exists(page):
    text = (ROOT / page).read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", text)) - {"it"} <= targets
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(
        r"\b((?:jobs|conf|tests|docs|benchmarks|deploy|examples|capsfusion_ray)/[\w./-]+\.(?:py|yaml|md|json))\b", text
    )
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_every_heading_that_a_page_links_to_exists(page):
    text, folder = (ROOT / page).read_text("utf-8"), (ROOT / page).parent
    links = re.findall(r"\]\(([\w./-]*\.md)?#([^)]+)\)", text)
    assert not [link for link in links if link[1] not in anchors(folder / link[0] if link[0] else ROOT / page)]


# ---------------------------------------------------------------------------------- commands and options, as they are typed

PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
JOBS = dict(runpy.run_path(str(ROOT / "docs/make_configuration.py"))["JOBS"])
SCHEMAS = JOBS | {"capsfusion submit": SubmitConfig}  # it has no file in jobs/
TARGETS = {"submit": "jobs/fuse.py", "resume": "jobs/fuse.py"}  # each other target of make has its job's name
WORDS = r"""((?: +(?:[^\s`#|<>&;"']|"[^"]*"|'[^']*')+)+)"""
JOB = re.compile(r"\b(jobs/\w+\.py)" + WORDS)
COMMAND = re.compile(r"(?<![\w-])capsfusion (\w+)" + WORDS)
NAMED_COMMAND = re.compile(r"(?:^|`|/bin/)capsfusion (\w+)", re.MULTILINE)  # at the start of a line or of a code span
MAKE = re.compile(r"""\bmake ([a-z-]+)(?: [A-Z_]+=[^\s"'`]+)* ARGS=(?:"([^"]*)"|'([^']*)')""")
OPTION = re.compile(r"(?<![\w./{-])([a-z_]+(?:\.[a-z_]+)+)=")
SPAN = re.compile(r"`([a-z_]+)=[^`]*`")
OWN_YAML = re.compile(
    r"^```yaml\n# (\w+\.yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL
)  # its first line is the file name
LEFT_TO_THE_READER = re.compile("…|<")


def keys(schema):
    """Every key that may be given; a free-form dict ends in a dot, because any name may follow."""
    return [key.name + "." * (key.wants == "mapping") for key in keys_of(schema) if key.wants != "section"]


def known(key, schema):
    return any(key == k.rstrip(".") or (k.endswith(".") and key.startswith(k)) for k in keys(schema))


def typed(text):
    """(name of a job, its words) of each `capsfusion …` and `python jobs/….py …`; those of submit hold two jobs."""
    for path, rest in JOB.findall(text):
        yield path, shlex.split(rest)
    for name, rest in COMMAND.findall(text):
        words = shlex.split(rest)
        if name == "submit":
            at = next((i for i, word in enumerate(words) if f"jobs/{word}.py" in JOBS), len(words))
            yield "capsfusion submit", words[:at]
            name, words = words[at] if at < len(words) else "", words[at + 1 :]
        yield f"jobs/{name}.py", words


def commands(text):
    """(job, its words) of each command in a page, lines that end in a backslash joined."""
    text = text.replace("\\\n", " ")
    for job, words in typed(text):
        if job in SCHEMAS and all("=" in word or word.endswith(".yaml") or word == "…" for word in words):
            yield job, words  # any other line is a sentence
    for target, double, single in MAKE.findall(text):
        job = TARGETS.get(target, f"jobs/{target}.py")
        if job in JOBS:
            yield job, shlex.split(double or single)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_gives_would_be_parsed(page, tmp_path):
    text = (ROOT / page).read_text("utf-8")
    for name, yaml in OWN_YAML.findall(text):
        (tmp_path / name).write_text(yaml, "utf-8")
    for job, words in commands(text):
        for key in (word.partition("=")[0] for word in words if re.match(r"[a-z_.]+=", word)):
            assert known(key, SCHEMAS[job]), f"{page}: {job} has no key {key}"
        if not LEFT_TO_THE_READER.search(" ".join(words)):
            parse_config(
                SCHEMAS[job],
                [str(tmp_path / word) if (tmp_path / word).is_file() else word for word in words],
                complete=False,
            )


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_names_is_a_job(page):
    named = set(NAMED_COMMAND.findall((ROOT / page).read_text("utf-8")))
    assert named <= set(cli.JOBS)


def test_the_page_on_gates_explains_every_reason():
    named = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/gates.md").read_text("utf-8"), re.MULTILINE))
    assert named == {reason.value for reason in Reason}


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_a_page_names_is_one_of_a_job(page):
    text = (ROOT / page).read_text("utf-8")
    named = {*OPTION.findall(text), *SPAN.findall(text)} - {"key"}
    assert not [key for key in named if not any(known(key, schema) for schema in SCHEMAS.values())]


def test_a_wrong_command_is_found():
    wrong = [
        'make fuse ARGS="input.pat=x"',
        "python jobs/verify.py output.path=o deep=perhaps",
        "make takedown ARGS='above={punsafe: 0.3}'",
        "capsfusion fuse conf/demo.yaml input.pat=x",
        "an output.path: `.venv/bin/capsfusion verify output.path=o deep=perhaps`",
    ]
    for text in wrong:
        ((job, words),) = commands(text)
        with pytest.raises(ConfigError):
            parse_config(SCHEMAS[job], words, complete=False)
    own, job = commands("capsfusion submit adress=http://head:8265 \\\n  fuse conf/demo.yaml engine.kindd=beam")
    assert own == ("capsfusion submit", ["adress=http://head:8265"])
    assert job == ("jobs/fuse.py", ["conf/demo.yaml", "engine.kindd=beam"])
    assert NAMED_COMMAND.findall("```sh\ncapsfusion fusee input.path=x\n```") == ["fusee"]
    assert not known("input.pat", JOBS["jobs/fuse.py"])
    assert known("output.storage.endpoint_url", JOBS["jobs/verify.py"])


# ------------------------------------------------------------------------------- messages, as the runbook quotes them

VARIES = "\0"  # stands in a message for what the program puts in
PLACEHOLDER = re.compile(r"%[-+ #0]*[\d*]*(?:\.\d+)?[sdrfgex]")  # of logging
OF_OTHERS = ("Ray:", "torch:", "Kubernetes:")  # their messages are not in our source


def message_of(node):
    """The text of a string literal, an f-string, or a sum of them; None for any other expression."""
    match node:
        case ast.Constant(value=str(text)):
            return PLACEHOLDER.sub(VARIES, text)
        case ast.JoinedStr(values=parts):
            return "".join(message_of(part) if isinstance(part, ast.Constant) else VARIES for part in parts)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return "".join(VARIES if text is None else text for text in (message_of(left), message_of(right)))
    return None


@functools.cache
def messages():
    """Every text in the package's source, docstrings apart."""
    found = set()
    for path in (ROOT / "capsfusion_ray").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        found |= {message_of(node) for node in nodes if node not in docstrings}
    return found - {None}


def is_said(quote):
    """Whether one message holds the quote; its … stands for any text."""
    pattern = re.compile(".*".join(map(re.escape, quote.split("…"))), re.DOTALL)
    return any(pattern.search(message) for message in messages())


def quotes(text):
    """What is in back ticks in the first column of each table whose first heading begins with `message`."""
    for table in re.findall(r"^\| message.*\n\|[ -|]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        for row in table.splitlines():
            cell = re.split(r"(?<!\\)\|", row)[1].strip()
            if not cell.startswith(OF_OTHERS) and not cell.startswith("the same message"):
                yield from re.findall(r"`([^`]+)`", cell)


def test_every_message_that_the_runbook_quotes_is_one_of_the_program():
    quoted = list(quotes((ROOT / "docs/runbook.md").read_text("utf-8")))
    assert len(quoted) > 60
    assert not [quote for quote in quoted if not is_said(quote)]


def test_the_log_that_the_runbook_shows_is_one_of_the_program():
    text = (ROOT / "docs/runbook.md").read_text("utf-8")
    shown = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    assert len(shown) == 4
    assert not [line for line in shown if not is_said(re.sub(r"\d[\d,.:]*", "…", line))]


def test_the_error_that_the_page_on_laion_coco_shows_is_one_of_the_program():
    text = (ROOT / "docs/laion-coco.md").read_text("utf-8")
    (shown,) = re.findall(r"^    error: (.+)\n    (.+)$", text, re.MULTILINE)
    assert is_said(re.sub(r"laion-coco-00002.parquet|\b\d+(?= rows then| now)", "…", " ".join(shown)))


def test_a_message_that_the_program_does_not_have_is_found():
    page = "| message | meaning |\n| --- | --- |\n| `error: …`, or `errata: …` | x |\n| Ray: `is over` | |\n\n| symptom | |\n"
    assert list(quotes(page)) == ["error: …", "errata: …"]
    assert is_said("error: …")
    assert not is_said("errata: …")
    assert not is_said("restore them (…), this output was begun with other settings")
