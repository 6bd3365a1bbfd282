"""Training crops: aligned, reproducible from their number, shared out, and what happens to files that cannot be used."""

from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ncsr_fast.data import RandomCrops, crop_loader, degrade, list_images, read_image, to_pair


def test_crops_are_windows(photos):
    crops = RandomCrops(photos, scale=4, crop=32)
    images = [read_image(path).float() for path in list_images(photos)]
    # all windows of all images that start at multiples of the scale
    windows = torch.cat([image.unfold(1, 32, 4).unfold(2, 32, 4).flatten(1, 2).movedim(1, 0) for image in images])
    assert len(crops) == 3
    for number in range(6):
        crop = crops[number]["hr"]
        assert crop.shape == (3, 32, 32) and crop.dtype == torch.uint8 and crop.is_contiguous()
        assert (windows == crop.float()).flatten(1).all(dim=1).any()


def test_crops_as_wide_as_the_image_and_at_every_height(tmp_path):
    ramp = np.add.outer(np.arange(16) * 16, np.arange(8)).astype(np.uint8)
    Image.fromarray(np.dstack([ramp] * 3)).save(tmp_path / "x.png")
    crops = [RandomCrops(tmp_path, scale=4, crop=8)[number]["hr"][0] for number in range(50)]
    tops = [int(crop[0, 0]) // 16 for crop in crops]
    assert set(tops) == {0, 4, 8}, "multiples of the scale, both ends among them"
    assert all(torch.equal(crop, torch.from_numpy(ramp)[top : top + 8]) for crop, top in zip(crops, tops))


def test_an_epoch_sees_every_image_once(photos):
    crops = RandomCrops(photos, scale=4, crop=32)
    for epoch in range(4):
        assert sorted(crops._shuffled(3 * epoch + place) for place in range(3)) == [0, 1, 2]
    assert len({tuple(crops._shuffled(3 * epoch + place) for place in range(3)) for epoch in range(20)}) > 1


def test_items_depend_on_seed_and_number_alone(photos):
    first, second = RandomCrops(photos, scale=4, crop=32, seed=1), RandomCrops([photos], scale=4, crop=32, seed=1)
    numbers = [5, 0, 7, 5]
    assert all(torch.equal(first[n]["hr"], second[n]["hr"]) for n in numbers)
    other = RandomCrops(photos, scale=4, crop=32, seed=2)
    assert any(not torch.equal(first[n]["hr"], other[n]["hr"]) for n in numbers)


def test_items_stay_what_they_were(photos):
    """The crops of a seed are part of what a run can be resumed from."""
    crops = RandomCrops(photos, scale=4, crop=32)
    for number, name, top, left in ((0, "nested/c.png", 40, 60), (1, "b.png", 56, 76)):
        assert torch.equal(crops[number]["hr"], read_image(photos / name)[:, top : top + 32, left : left + 32])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_resumed_loader_are_the_same(photos, workers, tmp_path):
    crops = RandomCrops(photos, scale=4, crop=32, cache_folder=tmp_path / "cache", cache_bytes=2**30)
    whole = [batch["hr"] for batch in crop_loader(crops, batch=2, first_step=0, stop_step=5)]
    rest = [batch["hr"] for batch in crop_loader(crops, batch=2, first_step=3, stop_step=5, workers=workers)]
    assert len(whole) == 5 and len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest))
    assert all(torch.equal(batch, crops.batch(step, 2)["hr"]) for step, batch in enumerate(whole))


def test_shares_add_up_to_the_batch(photos):
    crops = RandomCrops(photos, scale=4, crop=32)
    for world in (1, 2, 3, 6):
        loaders = [crop_loader(crops, 6, 1, 4, rank=rank, world=world) for rank in range(world)]
        assert [len(loader) for loader in loaders] == [3] * world
        for step, shares in enumerate(zip(*loaders), start=1):
            assert torch.equal(torch.cat([share["hr"] for share in shares]), crops.batch(step, 6)["hr"])


def test_bad_shares(photos):
    crops = RandomCrops(photos, scale=4, crop=32)
    with pytest.raises(ValueError, match="batch must be a positive multiple of the number of processes, 4, not 6"):
        crop_loader(crops, 6, 0, 1, world=4)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank must be one of the 2 of world, 0 … 1, not {rank}"):
            crop_loader(crops, 6, 0, 1, rank=rank, world=2)


@pytest.mark.slow
def test_spawned_workers(photos, tmp_path):
    """They open the cache anew, and share what a `.pklv4` holds."""
    arrays = [np.random.default_rng(n).integers(0, 256, (40, 50, 3), dtype=np.uint8) for n in range(40)]
    (tmp_path / "x.pklv4").write_bytes(pickle.dumps(arrays, 4))
    crops = RandomCrops([photos, tmp_path / "x.pklv4"], scale=4, crop=32, cache_folder=tmp_path / "cache", cache_bytes=2**30)
    expected = [crops.batch(step, 20) for step in range(3)]
    loader = crop_loader(crops, 20, 0, 3, workers=1)
    loader.multiprocessing_context = multiprocessing.get_context("spawn")
    assert all(torch.equal(batch["hr"], whole["hr"]) for batch, whole in zip(loader, expected, strict=True))


def thin(folder, target, factors=(4, 4, 4)):
    """Every so many pixels of the images of `folder`, as files of the same names."""
    for path, factor in zip(list_images(folder), factors):
        thinned = target / path.relative_to(folder)
        thinned.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(read_image(path)[:, ::factor, ::factor].permute(1, 2, 0).numpy()).save(thinned)
    return target


def test_paired_crops_are_aligned(photos, tmp_path):
    lr = thin(photos, tmp_path / "lr")
    crops = RandomCrops(photos, lr, scale=4, crop=32, cache_folder=tmp_path / "cache", cache_bytes=2**30)
    for number in range(9):
        item = crops[number]
        assert item["lr"].shape == (3, 8, 8) and torch.equal(item["lr"], item["hr"][:, ::4, ::4])


def test_pairs_of_pickled_images(tmp_path):
    arrays = [np.random.default_rng(n).integers(0, 256, (40 + 8 * n, 50, 3), dtype=np.uint8) for n in range(3)]
    hr, lr, short = (tmp_path / f"{name}.pklv4" for name in ("hr", "lr", "short"))
    hr.write_bytes(pickle.dumps(arrays, 4))
    lr.write_bytes(pickle.dumps([array[::4, ::4][:, : 50 // 4] for array in arrays], 4))
    short.write_bytes(pickle.dumps(arrays[:2], 4))
    crops = RandomCrops(hr, lr, scale=4, crop=32)
    assert len(crops) == 3 and all(torch.equal(crops[n]["lr"], crops[n]["hr"][:, ::4, ::4]) for n in range(9))
    crops[0]["hr"].zero_()
    assert crops[0]["hr"].any(), "crops are no views of the images"
    with pytest.raises(ValueError, match="hr.pklv4' contains 3 images and '.*short.pklv4' 2: every image needs a partner"):
        RandomCrops(hr, short, scale=4, crop=32)
    with pytest.warns(UserWarning, match=r"1 of 3 images are skipped:\n.*hr.pklv4\[0\]' is 40×50, smaller than a 48×48 crop"):
        assert len(RandomCrops(hr, scale=4, crop=48)) == 2


def test_several_places(photos, tmp_path):
    lr = thin(photos, tmp_path / "lr")
    images = [read_image(path) for path in list_images(photos)]
    hr_file, lr_file = tmp_path / "hr.pklv4", tmp_path / "lr.pklv4"
    hr_file.write_bytes(pickle.dumps([image.permute(1, 2, 0).numpy() for image in images[:1]], 4))
    lr_file.write_bytes(pickle.dumps([image[:, ::4, ::4].permute(1, 2, 0).numpy() for image in images[:1]], 4))
    crops = RandomCrops([photos, str(hr_file), photos], [lr, lr_file, lr], scale=4, crop=32)
    assert len(crops) == 7
    assert all(torch.equal(crops[n]["lr"], crops[n]["hr"][:, ::4, ::4]) for n in range(7))
    for places, lr_places, message in (
        ([], [], "images must name at least one folder of HR images or .pklv4 file"),
        ([photos, photos], [lr], "lr_images must name one place for each of the 2 of images, not 1"),
        ([photos], [lr_file], "images '.*photos' and lr_images '.*lr.pklv4' must both be folders, or .pklv4 files"),
    ):
        with pytest.raises(ValueError, match=message):
            RandomCrops(places, lr_places, scale=4, crop=32)
    for absent in ("absent", "absent.pklv4"):
        with pytest.raises(FileNotFoundError, match=absent):
            RandomCrops([photos, tmp_path / absent], scale=4, crop=32)


def test_pairs_of_the_wrong_scale_are_left_out(photos, tmp_path):
    lr = thin(photos, tmp_path / "lr", (4, 2, 4))
    with pytest.warns(UserWarning, match="1 of 3 images are skipped:\n.*b.png' is 48×60, not 1/4 of its HR image's 96×120"):
        assert len(RandomCrops(photos, lr, scale=4, crop=32)) == 2


def test_unusable_files_are_named_and_counted(photos):
    (photos / "broken.png").write_text("no image")
    Image.fromarray(np.zeros((20, 200, 3), dtype=np.uint8)).save(photos / "small.png")
    with pytest.warns(UserWarning, match="2 of 5 images are skipped") as caught:
        crops = RandomCrops(photos, scale=4, crop=32)
    assert "broken.png': it is not an image" in str(caught[0].message)
    assert "small.png' is 20×200, smaller than a 32×32 crop" in str(caught[0].message)
    assert len(crops) == 3 and len(crops.broken) == 2


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_a_file_whose_pixels_are_broken_is_replaced_by_the_next(photos, tmp_path, cache_bytes):
    """A truncated file has a good header, so it is found only when it is read."""
    path = photos / "b.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    crops = RandomCrops(photos, scale=4, crop=32, cache_folder=tmp_path / "cache", cache_bytes=cache_bytes)
    assert len(crops) == 3
    with pytest.warns(UserWarning, match="1 of 3 images are skipped:\n.*b.png") as caught:
        items = [crops[number] for number in range(9)]
    assert len(items) == 9 and len(caught) == 1, "one warning, not one an epoch"


@pytest.mark.parametrize(
    "error, reason", [(MemoryError(), "b.png' does not fit in memory"), (PermissionError("b.png is not yours"), "b.png")]
)
def test_a_file_that_cannot_be_read_now_ends_nothing(photos, monkeypatch, error, reason):
    def read(source):
        if source.name == "b.png":
            raise error
        return read_image(source)

    monkeypatch.setattr("ncsr_fast.data.crops.read_source", read)
    crops = RandomCrops(photos, scale=4, crop=32)
    with pytest.warns(UserWarning, match=f"1 of 3 images are skipped:\n.*{reason}"):
        assert not any(crops.name(number).endswith("b.png") for number in range(9))


def test_nothing_left_is_an_error(photos):
    with pytest.raises(ValueError, match="no usable image is left"), pytest.warns(UserWarning, match="3 of 3"):
        RandomCrops(photos, scale=4, crop=160)
    for path in list_images(photos):
        path.write_bytes(path.read_bytes()[:-200])
    crops = RandomCrops(photos, scale=4, crop=32)
    with pytest.raises(ValueError, match="no usable image is left: all 3 are broken"), pytest.warns(UserWarning):
        crops[0]


def test_a_batch_of_no_crops(photos):
    with pytest.raises(ValueError, match="batch must be at least 1, not 0"):
        RandomCrops(photos, scale=4, crop=32).batch(0, 0)


def test_more_crops_than_images(photos):
    """The images are gone through again."""
    crops = RandomCrops(photos, scale=4, crop=32)
    assert crops.batch(0, 7)["hr"].shape == (7, 3, 32, 32)
    assert sorted(map(crops.name, range(3, 6))) == [str(path) for path in list_images(photos)]


def test_bad_crop_sizes(photos):
    with pytest.raises(ValueError, match="crop must be a positive multiple of 2·scale = 8, not 30"):
        RandomCrops(photos, scale=4, crop=30)


def test_pairs_on_a_device(photos):
    batch = next(iter(crop_loader(RandomCrops(photos, scale=4, crop=32), batch=2, first_step=0, stop_step=1)))
    hr, lr = to_pair(batch, 4, "cpu")
    assert hr.shape == (2, 3, 32, 32) and lr.shape == (2, 3, 8, 8) and hr.dtype == lr.dtype == torch.float32
    assert torch.equal(lr, degrade(batch["hr"], 4).float() / 255) and 0 <= hr.min() and hr.max() <= 1
