"""One run folder has one writer."""

from __future__ import annotations

import errno
import json
import os
import socket

import pytest
from support import tiny_settings

from ncsr_fast.training import RunInUse, lock, train
from ncsr_fast.training.lock import sole_writer

fcntl = pytest.importorskip("fcntl")


def test_a_second_start_says_who_trains_and_touches_nothing(photos, tmp_path):
    run = tmp_path / "run"
    with sole_writer(run):
        held = (run / "lock").read_text()
        with pytest.raises(RunInUse) as caught:
            train(tiny_settings(photos), run, "cpu")
        assert [path.name for path in run.iterdir()] == ["lock"] and (run / "lock").read_text() == held
        with pytest.raises(RunInUse), sole_writer(run):
            pass  # as the one before, it has not taken the lock away
    said = str(caught.value)
    assert f"run' is in use: process {os.getpid()} on {socket.gethostname()} has been training in this folder since 20" in said
    assert said.endswith("; wait until that process ends, stop it, or choose another folder")
    with sole_writer(run):
        pass


def test_nothing_stays_but_what_was_written(tmp_path):
    with sole_writer(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / "lock").is_file()
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    with sole_writer(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir(), "it was there before"
    with sole_writer(tmp_path / "c" / "d"):
        (tmp_path / "c" / "d" / "settings.json").touch()
    assert [path.name for path in (tmp_path / "c" / "d").iterdir()] == ["settings.json"]


@pytest.mark.parametrize("left", ['{"pid": 1, "host": "elsewhere", "since": "long ago", "and": "more than that"}', "", "{"])
def test_what_a_killed_process_left_is_no_obstacle(tmp_path, left):
    (tmp_path / "lock").write_text(left)
    with sole_writer(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_holder_that_has_not_written_yet(tmp_path, text):
    with sole_writer(tmp_path):
        (tmp_path / "lock").write_text(text)
        with pytest.raises(RunInUse, match="in use: another process has begun to train in this folder"), sole_writer(tmp_path):
            pass


def test_a_lock_that_is_removed_as_it_is_taken(tmp_path, monkeypatch):
    """Its holder leaves between the opening and the locking of the file: the lock would be on a file nobody else sees."""
    flock, calls = fcntl.flock, []

    def late(descriptor, operation):
        calls.append(None)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with sole_writer(tmp_path):
        assert len(calls) == 2
        with pytest.raises(RunInUse), sole_writer(tmp_path):
            pass


def test_workers_do_not_hold_it(tmp_path):
    """They may outlive a run that is killed."""
    with sole_writer(tmp_path):
        (descriptor,) = lock._held
        child = os.fork()
        if child == 0:
            try:
                os.fstat(descriptor)
            except OSError as error:
                os._exit(error.errno)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EBADF
        with pytest.raises(RunInUse), sole_writer(tmp_path):
            pass  # the parent still does


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available.*no second run"), sole_writer(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.warns(UserWarning, match="cannot be locked .this system has no flock"), sole_writer(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
