"""Training crops: aligned, reproducible from their number, and what happens to files that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ncsr_fast.data import RandomCrops, crop_loader, degrade, list_images, read_image, to_pair


def all_turns(image: torch.Tensor) -> list[torch.Tensor]:
    turned = [torch.rot90(image, turns, dims=(1, 2)) for turns in range(4)]
    return turned + [t.flip(2) for t in turned]


def test_crops_are_windows_turned_and_flipped(photos):
    crops = RandomCrops(photos, scale=4, crop=32)
    images = [read_image(path).float() for path in list_images(photos)]
    assert len(crops) == 3
    for number in range(6):
        crop = crops[number]["hr"]
        assert crop.shape == (3, 32, 32) and crop.dtype == torch.uint8
        # the window is in one of the images in one of the eight orientations, at multiples of the scale
        windows = torch.cat([image.unfold(1, 32, 4).unfold(2, 32, 4).flatten(1, 2).movedim(1, 0) for image in images])
        assert any((windows == turned.float()).flatten(1).all(dim=1).any() for turned in all_turns(crop))


def test_all_eight_orientations_and_every_image_occur(tmp_path):
    ramp = np.add.outer(np.arange(8) * 16, np.arange(8)).astype(np.uint8)
    Image.fromarray(np.dstack([ramp] * 3)).save(tmp_path / "x.png")
    crops = RandomCrops(tmp_path, scale=4, crop=8)
    seen = {tuple(crops[number]["hr"][0].flatten().tolist()) for number in range(100)}
    expected = {tuple(t[0].flatten().tolist()) for t in all_turns(torch.from_numpy(np.stack([ramp] * 3)))}
    assert seen == expected, "a crop of exactly the image's size, in all eight orientations"


def test_an_epoch_sees_every_image_once(photos):
    crops = RandomCrops(photos, scale=4, crop=32)
    for epoch in range(4):
        assert sorted(crops._shuffled(3 * epoch + place) for place in range(3)) == [0, 1, 2]
    assert len({tuple(crops._shuffled(3 * epoch + place) for place in range(3)) for epoch in range(20)}) > 1


def test_items_depend_on_seed_and_number_alone(photos):
    first, second = RandomCrops(photos, scale=4, crop=32, seed=1), RandomCrops(photos, scale=4, crop=32, seed=1, cache=0)
    numbers = [5, 0, 7, 5]
    assert all(torch.equal(first[n]["hr"], second[n]["hr"]) for n in numbers)
    other = RandomCrops(photos, scale=4, crop=32, seed=2)
    assert any(not torch.equal(first[n]["hr"], other[n]["hr"]) for n in numbers)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_resumed_loader_are_the_same(photos, workers):
    crops = RandomCrops(photos, scale=4, crop=32)
    whole = [batch["hr"] for batch in crop_loader(crops, batch=2, first_step=0, steps=5)]
    rest = [batch["hr"] for batch in crop_loader(crops, batch=2, first_step=3, steps=5, workers=workers)]
    assert len(whole) == 5 and len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest))


def test_paired_crops_are_aligned(photos, tmp_path):
    lr = tmp_path / "lr"
    for path in list_images(photos):
        target = lr / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(read_image(path)[:, ::4, ::4].permute(1, 2, 0).numpy()).save(target)
    crops = RandomCrops(photos, lr, scale=4, crop=32, augment=False)
    for number in range(5):
        item = crops[number]
        assert torch.equal(item["lr"], item["hr"][:, ::4, ::4])
    augmented = RandomCrops(photos, lr, scale=4, crop=32)
    for number in range(5):
        item = augmented[number]
        assert any(torch.equal(turned, item["lr"]) for hr in all_turns(item["hr"]) for turned in all_turns(hr[:, ::4, ::4]))


def test_pairs_of_the_wrong_scale_are_left_out(photos, tmp_path):
    lr = tmp_path / "lr"
    for path, factor in zip(list_images(photos), (4, 2, 4)):
        target = lr / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(read_image(path)[:, ::factor, ::factor].permute(1, 2, 0).numpy()).save(target)
    with pytest.warns(UserWarning, match="1 of 3 images are skipped:\n.*b.png' is 48×60, not 1/4 of its HR image's 96×120"):
        assert len(RandomCrops(photos, lr, scale=4, crop=32)) == 2


def test_unusable_files_are_named_and_counted(photos):
    (photos / "broken.png").write_text("no image")
    Image.fromarray(np.zeros((20, 200, 3), dtype=np.uint8)).save(photos / "small.png")
    with pytest.warns(UserWarning, match="2 of 5 images are skipped") as caught:
        crops = RandomCrops(photos, scale=4, crop=32)
    assert "broken.png': not an image" in str(caught[0].message)
    assert "small.png' is 20×200, smaller than a 32×32 crop" in str(caught[0].message)
    assert len(crops) == 3 and len(crops.broken) == 2


def test_a_file_whose_pixels_are_broken_is_replaced_by_the_next(photos):
    """A truncated file has a good header, so it is found only when it is read."""
    path = photos / "b.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    crops = RandomCrops(photos, scale=4, crop=32, augment=False)
    assert len(crops) == 3
    with pytest.warns(UserWarning, match="1 of 3 images are skipped:\n.*b.png") as caught:
        items = [crops[number] for number in range(9)]
    assert len(items) == 9 and len(caught) == 1, "one warning, not one an epoch"


def test_nothing_left_is_an_error(photos):
    with pytest.raises(ValueError, match="no usable image is left"), pytest.warns(UserWarning, match="3 of 3"):
        RandomCrops(photos, scale=4, crop=160)
    for path in list_images(photos):
        path.write_bytes(path.read_bytes()[:-200])
    crops = RandomCrops(photos, scale=4, crop=32)
    with pytest.raises(ValueError, match="no usable image is left: all 3 are broken"), pytest.warns(UserWarning):
        crops[0]


def test_bad_crop_sizes(photos):
    with pytest.raises(ValueError, match="crop must be a positive multiple of 2·scale = 8, not 30"):
        RandomCrops(photos, scale=4, crop=30)


def test_pairs_on_a_device(photos):
    batch = next(iter(crop_loader(RandomCrops(photos, scale=4, crop=32), batch=2, first_step=0, steps=1)))
    hr, lr = to_pair(batch, 4, "cpu")
    assert hr.shape == (2, 3, 32, 32) and lr.shape == (2, 3, 8, 8) and hr.dtype == lr.dtype == torch.float32
    assert torch.equal(lr, degrade(batch["hr"], 4).float() / 255) and 0 <= hr.min() and hr.max() <= 1
