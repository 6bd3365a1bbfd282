"""Degradations of one's own: found by name, checked, reproducible."""

from __future__ import annotations

import multiprocessing
import sys

import pytest
import torch

from ncsr_fast.data import RandomCrops, crop_loader, load_degradation

HR = torch.arange(3 * 16 * 16).view(3, 16, 16).to(torch.uint8)
SOURCE = """
import torch
def noisy(hr, scale, generator):
    lr = hr[:, ::scale, ::scale].clone()
    noise = torch.randint(0, 50, lr.shape, generator=generator, dtype=torch.uint8)
    hr.zero_()
    return lr // 2 + noise
notes = "not a function"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module of degradations."""
    (tmp_path / "own_degradations.py").write_text(SOURCE)
    (tmp_path / "importing.py").write_text("import not_installed_anywhere")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own_degradations", "importing"):
        sys.modules.pop(name, None)


def nearest(hr, scale, generator):
    return hr[:, ::scale, ::scale]


def test_bicubic_is_none():
    assert load_degradation("bicubic") is None


def test_a_function_or_its_name(folder):
    path = list(sys.path)
    named = load_degradation("own_degradations:noisy")
    assert sys.path == path, "the current folder is importable while the module is imported alone"
    first, second, other = (named(HR, 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other) and first.shape == (3, 4, 4)
    assert torch.equal(load_degradation(nearest)(HR, 4, torch.Generator()), HR[:, ::4, ::4])


def test_the_crop_is_the_functions_own(folder):
    before = HR.clone()
    load_degradation("own_degradations:noisy")(HR, 4, torch.Generator())
    assert torch.equal(HR, before)


@pytest.mark.parametrize(
    "name, message",
    [
        ("blur", 'degradation \'blur\' is malformed: write "bicubic", or "module:function"'),
        ("a:b:c", "is malformed"),
        ("my/file.py:blur", "is malformed"),
        (":blur", "is malformed"),
        ("absent_module:blur", "there is no module 'absent_module', neither in '.*' nor installed: write"),
        ("os.absent:blur", "there is no module 'os.absent'"),
        ("own_degradations:absent", r"own_degradations \(.*own_degradations.py\) has no function 'absent': write"),
        ("own_degradations:notes", "has no function 'notes'"),
        (3, "degradation must be a name or a function, not 3: write"),
    ],
)
def test_bad_names(folder, name, message):
    with pytest.raises(ValueError, match=message):
        load_degradation(name)
    assert str(folder) not in sys.path


def test_what_a_module_raises_is_not_hidden(folder):
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_degradation("importing:blur")


@pytest.mark.parametrize(
    "result, message",
    [
        (None, r"'.*<lambda>' must return a uint8 tensor of shape \(3, 4, 4\), not a NoneType"),
        (torch.zeros(3, 4, 4), r"not torch.float32 \(3, 4, 4\)"),
        (torch.zeros(3, 5, 4, dtype=torch.uint8), r"not torch.uint8 \(3, 5, 4\)"),
    ],
)
def test_bad_results_name_the_function(result, message):
    with pytest.raises(ValueError, match=message):
        load_degradation(lambda hr, scale, generator: result)(HR, 4, torch.Generator())


def test_items_are_decided_by_seed_and_number(folder, photos):
    crops, again = (RandomCrops(photos, scale=4, crop=32, degradation="own_degradations:noisy") for _ in range(2))
    plain = RandomCrops(photos, scale=4, crop=32)
    for number in (3, 0, 3):
        item = crops[number]
        assert torch.equal(item["hr"], plain[number]["hr"]) and torch.equal(item["lr"], again[number]["lr"])
        noise = item["lr"].int() - item["hr"][:, ::4, ::4] // 2
        assert noise.min() >= 0 and noise.max() < 50 and noise.unique().numel() > 5
    noises = [crops[n]["lr"].int() - crops[n]["hr"][:, ::4, ::4] // 2 for n in (0, 1)]
    assert not torch.equal(*noises)
    other = RandomCrops(photos, scale=4, crop=32, degradation="own_degradations:noisy", seed=1)
    assert not torch.equal(other[0]["lr"], crops[0]["lr"])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_in_workers(folder, photos, method):
    """A spawned worker imports the module itself, from the current folder too."""
    crops = RandomCrops(photos, scale=4, crop=32, degradation="own_degradations:noisy")
    loader = crop_loader(crops, 2, 1, 3, workers=1)
    loader.multiprocessing_context = multiprocessing.get_context(method)
    for step, batch in enumerate(loader, start=1):
        assert torch.equal(batch["lr"], crops.batch(step, 2)["lr"])


def test_lr_images_and_a_degradation(photos):
    with pytest.raises(ValueError, match="makes LR images, but lr_images names LR images too"):
        RandomCrops(photos, photos, scale=4, crop=32, degradation=nearest)
