"""The tables of the pages are views of the stored rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from ncsr_fast.benchmarks import pages

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_a_page_says_what_the_rows_say(page):
    assert pages.written(page) == page.read_text(encoding="utf-8"), "python -m ncsr_fast.benchmarks.pages writes the tables"


def test_every_table_is_on_a_page():
    found = [name for page in pages.PAGES for _, name, _, _ in pages._MARKED.findall(page.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(pages.TABLES)


def test_a_stale_page_is_refused(tmp_path, monkeypatch):
    stale = tmp_path / "page.md"
    stale.write_text("<!-- figures: headline -->\n| 1 s |\n<!-- end of figures -->\n", encoding="utf-8")
    monkeypatch.setattr(pages, "PAGES", (stale,))
    monkeypatch.setattr("sys.argv", ["pages", "--check"])
    with pytest.raises(ValueError, match="page.md"):
        pages.main()
    assert "1 s" in stale.read_text(encoding="utf-8"), "--check writes nothing"
