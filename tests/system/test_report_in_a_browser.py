"""The report in a real Chromium: search, filters and theme work, it fits a phone, and it sends no request."""

import re
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_run import finished
from playwright.sync_api import sync_playwright

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.dataset.layout import COMPARISON, REPORT
from capsfusion_ray.reports.job import ReportConfig, report
from capsfusion_ray.training.evaluate import EvaluateConfig, EvaluateOutputConfig, ReferenceConfig, evaluate

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
]
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
HOSTILE = "Cape C </script><img src=https://example.com/x.png onerror=alert(1)> No. 77"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=300_000)
        yield chromium
        chromium.close()


def hostile_run(path):
    """A finished run of 24 rows, one of which has a caption with markup in it."""
    manifest = finished(path)
    a_file = next(path / "out" / file.path for file in manifest.files if file.kind == "data")
    table = pq.read_table(a_file, partitioning=None)
    captions = [HOSTILE, *table["capsfusion"].to_pylist()[1:]]
    at = table.column_names.index("capsfusion")
    pq.write_table(
        table.set_column(at, table.schema.field(at), pa.array(captions, table.schema.field(at).type)), a_file
    )
    return OutputConfig(str(path / "out"))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The report of such a run, with an evaluation against its own captions as references."""
    run, figures = hostile_run(tmp_path_factory.mktemp("run")), str(tmp_path_factory.mktemp("figures"))
    evaluate(
        EvaluateConfig(
            ReferenceConfig(run.path, reference="capsfusion"), run.path, output=EvaluateOutputConfig(figures)
        )
    )
    report(ReportConfig(run, evaluation=figures))
    return Path(run.path) / REPORT


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """The comparison of that run with one without the markup."""
    run, calm = hostile_run(tmp_path_factory.mktemp("one")), tmp_path_factory.mktemp("other")
    finished(calm)
    report(ReportConfig(run, beside=OutputConfig(str(calm / "out"))))
    return Path(run.path) / COMPARISON


@contextmanager
def opened(browser, file, size, scheme):
    """Open the page in a window. Fails at the end if there was a console message, an error or a request."""
    context = browser.new_context(viewport=size, color_scheme=scheme)
    context.set_default_timeout(120_000)
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "request",
        lambda seen: None if seen.url.startswith(("file:", "data:")) else trouble.append(f"request: {seen.url}"),
    )
    page.goto(file.as_uri())
    yield page
    context.close()
    assert not trouble


WINDOWS = pytest.mark.parametrize(
    ("size", "scheme"), [(PHONE, "dark"), (DESKTOP, "light")], ids=["phone-dark", "desktop-light"]
)


@pytest.fixture
def page(browser, output: Path, size, scheme):
    with opened(browser, output, size, scheme) as page:
        yield page


def found(page) -> list[int]:
    """(rows that match, rows in the sample)"""
    return [int(n) for n in re.findall(r"\d+", page.inner_text("#found"))]


@WINDOWS
def test_search_narrows_the_captions_and_hostile_text_stays_text(page):
    some, everything = found(page)
    assert some == everything == page.locator("article").count() == 24
    page.fill("#search", "CAPE C </SCRIPT><IMG")
    assert found(page) == [1, 24]
    assert HOSTILE in page.inner_text("article .fused")
    assert page.locator("article img").count() == 0
    page.fill("#search", "no such words anywhere")
    assert found(page) == [0, 24]
    assert page.locator("article").count() == 0


@WINDOWS
def test_a_filter_shows_one_gate_and_all_brings_the_others_back(page):
    buttons = page.locator("#filters button")
    labels = buttons.all_inner_texts()
    assert labels[0] == "all 24"
    name, count = next(label for label in labels if label.startswith("cut_off")).split()
    page.get_by_role("button", name=f"{name} {count}").click()
    assert found(page) == [int(count), 24]
    assert {tags.split("\n")[0] for tags in page.locator("article .tags").all_inner_texts()} == {name}
    buttons.first.click()
    assert found(page) == [24, 24]


@WINDOWS
def test_the_theme_follows_the_system_and_the_button(page, scheme):
    def ground():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    def brightness():
        return sum(int(n) for n in re.findall(r"\d+", ground())[:3])

    assert (brightness() < 3 * 128) == (scheme == "dark")
    before = ground()
    page.click("#theme")
    assert (brightness() < 3 * 128) == (scheme == "light")
    page.click("#theme")
    assert ground() == before


@WINDOWS
def test_figures_against_references_are_a_table(page):
    heads = page.locator("#evaluation-systems th").all_inner_texts()
    assert heads[1:] == ["output", "raw", "synthetic", "raw. synthetic", "extractive oracle", "reference"]
    first = page.locator("#evaluation-figures tr").first.locator("th, td").all_inner_texts()
    assert first[0] == "ROUGE-L"
    assert [first[1], first[6]] == ["1.000", "1.000"]
    assert page.locator("#evaluation-figures tr").count() == 14


@WINDOWS
def test_the_page_is_no_wider_than_its_window(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert re.match(r"All rows are accounted for: 24 planned = \d+ fused \+ ", page.inner_text("#totals .closes"))
    assert page.inner_text("#status").startswith("finished")


@WINDOWS
def test_two_outputs_stand_beside_each_other_with_their_differences_marked(browser, comparison, size, scheme):
    with opened(browser, comparison, size, scheme) as page:
        assert page.inner_text("#beside-rows") == "1 of 24 compared captions differ (4.2%)."
        gate = page.locator("#beside tbody tr", has_text="cut_off").first
        assert re.fullmatch(r"rejected: cut_off\s+(\d+\.\d%)\s+\1", gate.inner_text()), "the same rows, the same gates"
        assert page.locator("article .fused").count() == 2 * 24
        page.get_by_role("button", name="different 1").click()
        assert found(page) == [1, 24]
        one, other = page.locator("article .fused").all()
        assert HOSTILE in one.inner_text()
        assert HOSTILE not in other.inner_text()
        assert one.locator(".changed").count() > 0
        assert other.locator(".changed").count() > 0
        assert one.locator(".raw").count() + one.locator(".both").count() > 0, "coloured by origin all the same"
        left, right = one.bounding_box(), other.bounding_box()
        if size is DESKTOP:
            assert left["x"] + left["width"] <= right["x"]
            assert left["y"] == right["y"]
        else:
            assert left["x"] == right["x"]
            assert left["y"] + left["height"] <= right["y"]
        page.fill("#search", "onerror=alert")
        assert found(page) == [1, 24]
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
