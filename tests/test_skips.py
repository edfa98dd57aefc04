"""A test that skips for a reason that is not on the list fails the run."""

from pathlib import Path

import pytest

pytest_plugins = "pytester"


ONE_TEST = "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip({!r})\n"
WHOLE_MODULE = "import pytest\npytest.skip({!r}, allow_module_level=True)\n"


@pytest.mark.parametrize(
    ("module", "reason", "options", "code"),
    [(ONE_TEST, "no CUDA device", [], 0), (ONE_TEST, "not today", [], 1), (WHOLE_MODULE, "not today", ["-n", "1"], 1)],
)
def test_only_listed_reasons_may_skip(pytester, monkeypatch, module, reason, options, code):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "support"))  # conftest.py loads a plugin from there
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(module.format(reason))
    ran = pytester.runpytest_subprocess(*options)
    assert ran.ret == code
    assert (code == 0) == ("does not allow it" not in ran.stdout.str())
