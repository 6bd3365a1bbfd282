"""Samples put onto their LR image."""

from __future__ import annotations

import pytest
import torch
from support import image, tiny_model

from ncsr_fast import NCSR
from ncsr_fast.consistency import projected
from ncsr_fast.metrics import imresize, lr_psnr
from ncsr_fast.metrics.fidelity import to_uint8


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random images without the highest frequencies, well inside [0, 1]."""
    batch, channels, height, width = shape
    coarse = image(batch, channels, height // 2, width // 2, seed=seed)
    return (0.2 + 0.6 * imresize(coarse, 2)).clamp(0, 1)


@pytest.mark.parametrize("scale, size", [(4, (6, 9)), (8, (4, 3)), (2, (5, 8))])
def test_the_nearest_images_that_reduce_to_the_lr_image(scale, size):
    """The reduction is that of imresize, and the change is orthogonal to all that reduces to nothing."""
    lr = 0.3 + 0.4 * smooth(2, 3, 2 * (size[0] // 2), 2 * (size[1] // 2))
    images = 0.3 + 0.4 * imresize(lr, scale)[:, None] + 0.02 * image(2, 3, 3, *(scale * side for side in lr.shape[2:]), seed=2)
    found = projected(images, lr, scale)
    assert (0 < found.min()) and (found.max() < 1), "nothing was clipped"
    assert (imresize(found, 1 / scale) - lr[:, None]).abs().max() < 1e-12
    free = image(*images.shape, seed=3)
    other = projected(0.5 + 0.1 * free, lr, scale) - found  # of two that reduce to lr
    assert ((found - images) * other).sum().abs() < 1e-9 * (found - images).norm() * other.norm()


def test_clipping_is_answered():
    """Pixels at the ends of [0, 1] do not keep the others from it."""
    hr = (2.5 * imresize(image(1, 3, 12, 16, seed=1), 4) - 0.75).clamp(0, 1)
    assert (hr == 0).double().mean() > 0.05 and (hr == 1).double().mean() > 0.05
    lr = imresize(to_uint8(hr), 1 / 4).double() / 255
    images = hr[:, None] + 0.2 * image(1, 2, 3, 48, 64, seed=2) - 0.1
    found = projected(images, lr, 4)
    assert found.min() >= 0 and found.max() <= 1
    before, after = (float(lr_psnr(x[0], lr.expand(2, -1, -1, -1), 4).min()) for x in (images.clamp(0, 1), found))
    assert before < 40 and after > 50


def test_images_that_are_not_finite_stay():
    lr, images = smooth(1, 3, 4, 4), smooth(2, 3, 16, 16)[None].clone()
    images[0, 1, 0, 3, 3] = torch.nan
    found = projected(images, lr, 4)
    assert torch.equal(found[0, 1].nan_to_num(7), images[0, 1].nan_to_num(7)) and found[0, 0].isfinite().all()
    with pytest.raises(ValueError, match=r"images must have shape .* as \(1, 3, 16, 16\), not \(1, 2, 3, 16, 15\)"):
        projected(images[..., :15], lr, 4)
    with pytest.raises(ValueError, match="scale must be 2 or more, not 1"):
        projected(lr, lr, 1)


def test_samples_of_a_photograph_after_eight_bits(kept_photos):
    from ncsr_fast.data import read_image, to_float

    model = NCSR.from_pretrained("ncsr-compact-x4").eval()
    lr = to_float(read_image(kept_photos / "a.png"))[None, :, :40, :50]
    options = {"n": 2, "temperature": 0.8}
    with torch.no_grad():
        plain, found = (
            model.sample(lr, generator=torch.Generator().manual_seed(0), project=project, **options)
            for project in (False, True)
        )
    before, after = (lr_psnr(x[0], lr.expand(2, -1, -1, -1), 4) for x in (plain, found))
    assert before.max() < 50 < after.min()


def test_gradients_go_through():
    lr = smooth(1, 1, 2, 4).requires_grad_()
    images = (0.3 + 0.4 * smooth(1, 1, 4, 8)[None]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: projected(x, y, 2, rounds=1), (images, lr))


def test_samples_are_not_projected_unless_asked():
    model, lr = tiny_model(), smooth(1, 3, 4, 4)
    with torch.no_grad():
        plain, asked = (model.sample(lr, 1, 0.0, project=project, on_nonfinite="ignore") for project in (False, True))
        assert torch.equal(model.sample(lr, 1, 0.0, on_nonfinite="ignore"), plain)
        assert torch.equal(asked, projected(plain, lr, 4)) and not torch.equal(asked, plain)
