"""Decoded images on disk: decoded once, by anyone, whatever happens to those who do."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import types
import warnings

import pytest
import torch
from PIL import Image
from support import as_a_worker

from ncsr_fast.data import RandomCrops, list_images, read_image
from ncsr_fast.data.cache import ImageCache
from ncsr_fast.data.images import image_size

fcntl = pytest.importorskip("fcntl")
PIXELS = 96 * 120 * 3
FORK, SPAWN = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")


@pytest.fixture
def sizes(photos):
    return {path: image_size(path) for path in list_images(photos)}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files decoded from here on, in this process."""
    names = []

    def counting(path):
        names.append(path.name)
        return read_image(path)

    monkeypatch.setattr("ncsr_fast.data.cache.read_image", counting)
    return names


def read_all(cache, sizes) -> None:
    for path in sizes:
        assert torch.equal(cache.read(path), read_image(path))


def in_processes(context, target, *arguments, count: int = 1) -> list[int]:
    """The exit status of each of `count` processes that did target(*arguments) at once."""
    processes = [context.Process(target=as_a_worker, args=(target, *arguments), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_images_are_decoded_once(sizes, folder, decoded):
    cache = ImageCache(folder, 2**30, sizes)
    for _ in range(3):
        read_all(cache, sizes)
    assert decoded == ["a.png", "b.png", "c.png"]
    read_all(ImageCache(folder, 2**30, sizes), sizes)
    assert len(decoded) == 3, "a resumed run uses what is there"


@pytest.mark.parametrize("context", [FORK, pytest.param(SPAWN, marks=pytest.mark.slow)], ids=["fork", "spawn"])
def test_what_other_processes_decode_is_there(sizes, folder, decoded, context):
    cache = ImageCache(folder, 2**30, sizes)
    assert in_processes(context, cache.read, list(sizes)[1]) == [0]
    read_all(cache, sizes)
    assert decoded == ["a.png", "c.png"]


def _start_and_read(barrier, folder, sizes) -> None:
    barrier.wait()
    cache = ImageCache(folder, 2**30, sizes)
    barrier.wait()
    for _ in range(5):
        read_all(cache, sizes)
    assert sorted(os.listdir(folder)) == ["flags", "index", "lock", "pixels"]


@pytest.mark.slow
def test_processes_that_start_and_fill_a_cache_at_once(sizes, folder, decoded):
    for _ in range(5):
        barrier = FORK.Barrier(4)
        assert in_processes(FORK, _start_and_read, barrier, folder, sizes, count=4) == [0] * 4
        cache = ImageCache(folder, 2**30, sizes)
        read_all(cache, sizes)
        assert decoded == []
        cache.remove()


def _die_half_way(folder, sizes) -> None:
    write = os.pwrite

    def write_half(descriptor, data, offset):
        write(descriptor, bytes(len(data) // 2), offset)
        os.kill(os.getpid(), signal.SIGKILL)

    cache = ImageCache(folder, 2**30, sizes)
    first, second, *_ = sizes
    cache.read(first)
    os.pwrite = write_half
    cache.read(second)


def test_a_writer_that_was_killed(sizes, folder, decoded):
    assert in_processes(FORK, _die_half_way, folder, sizes) == [-signal.SIGKILL]
    cache = ImageCache(folder, 2**30, sizes)
    assert (folder / "flags").read_bytes() == b"\1\0\0"
    for _ in range(2):
        read_all(cache, sizes)
    assert decoded == ["b.png", "c.png"], "what was complete is kept, what was not is written anew"


def _die_making(folder, sizes) -> None:
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)  # what puts the index in its place
    ImageCache(folder, 2**30, sizes)


def test_a_maker_that_was_killed(sizes, folder, decoded):
    ImageCache(folder, 2**20, sizes)
    assert in_processes(FORK, _die_making, folder, sizes) == [-signal.SIGKILL]
    cache = ImageCache(folder, 2**30, sizes)
    for _ in range(2):
        read_all(cache, sizes)
    assert len(decoded) == 3


def test_short_writes(sizes, folder, decoded, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: write(descriptor, data[:10_000], offset))
    cache = ImageCache(folder, 2**30, sizes)
    for _ in range(2):
        read_all(cache, sizes)
    assert len(decoded) == 3


@pytest.mark.parametrize("change", ["pixels", "touched", "limit", "more", "boot"])
def test_a_cache_of_something_else_is_replaced(sizes, folder, decoded, change, monkeypatch):
    read_all(ImageCache(folder, 2**30, sizes), sizes)
    limit, path = 2**30, next(iter(sizes))
    if change == "pixels":
        Image.open(path).rotate(180).save(path)
    elif change == "touched":
        os.utime(path, (1, 1))
    elif change == "limit":
        limit = 2**29
    elif change == "more":
        Image.open(path).save(path.with_name("z.png"))
        sizes[path.with_name("z.png")] = (96, 120)
    else:
        monkeypatch.setattr("ncsr_fast.data.cache._boot_id", lambda: "after a crash")
    decoded.clear()
    cache = ImageCache(folder, limit, sizes)
    for _ in range(2):
        read_all(cache, sizes)
    assert len(decoded) == len(sizes)


def test_without_a_boot_id_a_cache_lasts_as_long_as_it_is_used(sizes, folder, decoded, monkeypatch):
    monkeypatch.setattr("ncsr_fast.data.cache._boot_id", lambda: None)
    first = ImageCache(folder, 2**30, sizes)
    read_all(first, sizes)
    second = ImageCache(folder, 2**30, sizes)
    read_all(second, sizes)
    assert len(decoded) == 3
    del first, second
    gc.collect()
    read_all(ImageCache(folder, 2**30, sizes), sizes)
    assert len(decoded) == 6


def test_the_limit_is_kept(sizes, folder, decoded):
    first, second, third = sizes
    Image.open(second).resize((200, 200)).save(second)
    sizes[second] = (200, 200)
    cache = ImageCache(folder, 2 * PIXELS, sizes)
    for _ in range(2):
        read_all(cache, sizes)
    assert decoded == ["a.png", "b.png", "c.png", "b.png"], "those that fit, in order"
    assert (folder / "pixels").stat().st_size == 2 * PIXELS
    assert (folder / "pixels").stat().st_blocks * 512 <= 2 * PIXELS + 4096


def test_half_of_the_disk_stays_free(sizes, folder, decoded, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=5 * PIXELS))
    cache = ImageCache(folder, 2**30, sizes)
    for _ in range(2):
        read_all(cache, sizes)
    assert decoded == ["a.png", "b.png", "c.png", "c.png"]


def test_nothing_fits(sizes, folder, decoded):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is wrong
        read_all(ImageCache(folder, 1, sizes), sizes)
    assert len(decoded) == 3 and (folder / "pixels").stat().st_size == 0


def test_sparse_until_written(sizes, folder):
    ImageCache(folder, 2**30, sizes)
    assert (folder / "pixels").stat().st_size == 3 * PIXELS and (folder / "pixels").stat().st_blocks == 0


def test_an_image_of_another_size_than_its_header_told(sizes, folder, decoded):
    first, second, third = sizes
    cache = ImageCache(folder, 2**30, sizes)
    Image.open(second).resize((150, 120)).save(second)
    for _ in range(2):
        read_all(cache, sizes)
    assert decoded == ["a.png", "b.png", "c.png", "b.png"]


def test_a_full_disk(sizes, folder, decoded, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    cache = ImageCache(folder, 2**30, sizes)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="decoded every time: .*No space left") as caught:
        patch.setattr(os, "pwrite", full)
        for _ in range(2):
            read_all(cache, sizes)
    assert len(decoded) == 6 and len(caught) == 1


def test_a_folder_that_cannot_be_used(sizes, folder, decoded, monkeypatch):
    monkeypatch.setattr("ncsr_fast.data.cache._PAUSE", 0.001)
    folder.parent.mkdir()
    folder.write_text("a file")
    with pytest.warns(UserWarning, match=r"decoded images are not cached in '.*cache', but decoded every time: .*exists"):
        cache = ImageCache(folder, 2**30, sizes)
    read_all(cache, sizes)
    folder.unlink()
    user = ImageCache(folder, 2**30, sizes)
    read_all(user, sizes)
    with pytest.warns(UserWarning, match="a running process uses it for other images"):
        other = ImageCache(folder, 2**30, dict(list(sizes.items())[:2]))
    decoded.clear()
    read_all(user, sizes)
    assert decoded == []
    read_all(other, sizes)
    assert len(decoded) == 3
    monkeypatch.setattr("ncsr_fast.data.cache.fcntl", None)
    with pytest.warns(UserWarning, match="cannot be locked"):
        read_all(ImageCache(folder, 2**30, sizes), sizes)


def test_removal(sizes, folder, decoded):
    cache = ImageCache(folder, 2**30, sizes)
    read_all(cache, sizes)
    cache.remove()
    assert not folder.exists()
    read_all(cache, sizes)
    assert len(decoded) == 3, "those who use it still can"
    cache.remove()
    cache = ImageCache(folder, 2**30, sizes)
    (folder / "notes.txt").touch()
    cache.remove()
    assert os.listdir(folder) == ["notes.txt"], "nothing but its own files"


def test_a_lock_that_is_removed_while_it_is_waited_for(sizes, folder, monkeypatch):
    """Its holder would not be seen by those who take the lock that is there since."""
    others, flock = [ImageCache(folder, 2**30, sizes)], fcntl.flock

    def replacing(file, operation):
        flock(file, operation)
        if operation == fcntl.LOCK_SH and len(others) == 1:
            others[0].remove()
            others.append(None)
            others.append(ImageCache(folder, 2**30, sizes))

    monkeypatch.setattr("ncsr_fast.data.cache.fcntl.flock", replacing)
    cache = ImageCache(folder, 2**30, sizes)
    assert len(others) == 3 and os.path.samestat(os.fstat(cache._files[0].fileno()), os.stat(folder / "lock"))


def test_a_lock_that_somebody_deleted(sizes, folder):
    """Those who held it keep the files they had, though there are others by now."""
    user = ImageCache(folder, 2**30, sizes)
    (folder / "lock").unlink()
    other = dict(reversed(sizes.items()))
    read_all(ImageCache(folder, 2**30, other), other)
    read_all(user, sizes)


def test_files_are_closed(sizes, folder):
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("no /proc")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        user = ImageCache(folder, 2**30, sizes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ncsr_fast.data.cache._PAUSE", 0.001)
            ImageCache(folder, 2**20, sizes)  # has to give up
        del user
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert [warning.category for warning in caught] == [UserWarning], "files were closed, not just forgotten"


def test_a_copy_is_opened_anew(sizes, folder, decoded):
    cache = ImageCache(folder, 2**30, sizes)
    read_all(cache, sizes)
    content = pickle.dumps(cache)
    assert len(content) < PIXELS
    read_all(pickle.loads(content), sizes)
    assert len(decoded) == 3


def test_crops_are_the_same_and_their_own(photos, folder, decoded):
    cached = RandomCrops(photos, scale=4, crop=32, cache_folder=folder, cache_bytes=2**30)
    plain = RandomCrops(photos, scale=4, crop=32)
    for _ in range(2):
        for number in range(9):
            crop = cached[number]["hr"]
            assert torch.equal(crop, plain[number]["hr"])
            crop.fill_(7)  # not the cache's
    assert len(decoded) == 3
    cached.forget()
    assert not folder.exists()


def test_no_cache(photos, folder):
    for options in ({"cache_folder": folder}, {"cache_bytes": 2**30}, {"cache_folder": folder, "cache_bytes": 0}):
        RandomCrops(photos, scale=4, crop=32, **options).forget()
    assert not folder.exists()
