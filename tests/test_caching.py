"""What is made once is made again when anything that it depends on has changed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from caching import made_once


@pytest.fixture
def made(tmp_path):
    """Makes a file of a number that grows with each time, from the causes that are given; returns that number."""
    config = SimpleNamespace(cache=SimpleNamespace(mkdir=lambda name: tmp_path / name))
    (tmp_path / "made_once").mkdir()
    times = []

    def make(folder):
        times.append(None)
        (folder / "number").write_text(str(len(times)))

    return lambda *causes, name="thing": int((made_once(config, name, causes, make) / "number").read_text())


def test_it_is_made_again_when_a_cause_changes(made, tmp_path):
    source = tmp_path / "source"
    source.write_text("one")
    assert made(source, "3.6") == made(source, "3.6") == 1
    assert made(source, "3.7") == 2
    source.write_text("two")
    assert made(source, "3.7") == 3
    assert made(source, "3.7", name="other") == 4
    assert made(source, "3.7") == 3
    assert made("ab", "c") == 5 and made("a", "bc") == 6


def test_what_failed_is_not_kept(tmp_path):
    config = SimpleNamespace(cache=SimpleNamespace(mkdir=lambda name: tmp_path))

    def fail(folder):
        (folder / "half").write_text("")
        raise OSError("no space")

    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            made_once(config, "thing", ["cause"], fail)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]
