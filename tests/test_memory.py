"""What memory is free, and errors instead of a process that is killed."""

from __future__ import annotations

import resource

import pytest
import torch

from ncsr_fast import memory

MIB = 2**20


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 300 MiB of free memory; files of a container can be put into the folder returned."""
    (tmp_path / "meminfo").write_text("MemTotal: 999999 kB\nMemAvailable: 307200 kB\n")
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    return tmp_path


def container(folder, limit):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{90 * MIB}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {20 * MIB}\n")


@pytest.mark.parametrize("limit, free", [(None, 300), ("max", 300), (200 * MIB, 130), (50 * MIB, 0), (2**40, 300)])
def test_free_memory(machine, limit, free):
    if limit is not None:
        container(machine, limit)
    assert memory.free_memory() == free * MIB


def test_more_memory_than_is_free_is_an_error(machine):
    """Of each allocation, and of many together; once it is over there is as much as before."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory.within_free_memory():
        taken = [torch.empty(100 * MIB, dtype=torch.uint8)]
        with pytest.raises(RuntimeError) as caught:
            taken += [torch.empty(100 * MIB, dtype=torch.uint8) for _ in range(30)]  # whatever garbage goes meanwhile
        assert memory.is_out_of_memory(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len([torch.empty(100 * MIB, dtype=torch.uint8) for _ in range(4)]) == 4


def test_nothing_is_done_where_nothing_tells_what_is_free(machine):
    (machine / "meminfo").unlink()
    assert memory.free_memory() is None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory.within_free_memory():
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
