"""A test may be left out in one way only, and never silently."""

from __future__ import annotations

import errno

import pytest

from tests.support import ROOT, needs, parse_reason


def test_needs_says_what_was_not_run_and_refuses_every_other_skip(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("CRAYON_STRICT", raising=False)
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makepyfile(
        test_a="""
            import pytest
            from tests.support import needs

            def test_wants(): needs.module("no_such_package")
            def test_skips(): pytest.skip("not today")
            @pytest.mark.skip
            def test_marked(): pass
            @pytest.mark.xfail
            def test_expected(): assert False
            def test_fine(): pass
        """,
        test_b="""
            import pytest
            from tests.support import needs
            needs.module("no_such_package")
        """,
        test_c="""
            import pytest
            pytest.importorskip("no_such_package")
        """,
    )
    arguments = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    result = pytester.runpytest_subprocess(*arguments)
    result.assert_outcomes(passed=1, skipped=2, failed=2, errors=2)
    result.stdout.fnmatch_lines(["*Not run*", "2 for want of the Python package no_such_package; to have it: *"])

    monkeypatch.setenv("CRAYON_STRICT", "1")
    strict = pytester.runpytest_subprocess(*arguments)
    strict.assert_outcomes(passed=1, skipped=0, failed=3, errors=3)


def test_reasons_survive_the_report() -> None:
    assert parse_reason("Skipped: not here: a thing | buy one") == ("a thing", "buy one")
    assert parse_reason("Skipped: no time") is None


def test_a_small_disk_is_small() -> None:
    with needs.tmpfs(64 * 1024) as disk:
        (disk / "fits").write_bytes(bytes(16 * 1024))
        with pytest.raises(OSError, match="No space") as full:
            (disk / "does not fit").write_bytes(bytes(128 * 1024))
        assert full.value.errno == errno.ENOSPC
    assert not disk.exists()


def test_the_reference_model_is_there() -> None:
    assert (needs.reference_model() / "tokenizer.model").is_file()
