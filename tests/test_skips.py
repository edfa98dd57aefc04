"""A test that skips for a reason that is not on the list fails the run."""

from pathlib import Path

import pytest

pytest_plugins = "pytester"


@pytest.mark.parametrize(("reason", "code"), [("no CUDA device", 0), ("not today", 1)])
def test_only_listed_reasons_may_skip(pytester, reason, code):
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(f"import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip({reason!r})\n")
    assert pytester.runpytest_subprocess().ret == code
