"""Checks of images, noise and latents; their errors name the argument, what it was and what it should be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ncsr_fast.synchronization import reading_is_free

_BRIGHTEST, _DARKEST = 16.0, -1.0  # images, residuals and noisy images are far within; bytes and 16-bit pixels are not


def check_image(name: str, image: Tensor, like: Tensor, channels: int) -> None:
    """Raise unless `image` is (B, channels, H, W), of the dtype and device of the parameter `like`, finite, and not of 0 … 255.

    Values are read on the CPU only, because reading them on a GPU makes the host wait. B, H and W must be 1 or more.
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(image).__name__}")
    if image.dim() != 4 or image.shape[1] != channels:
        hint = "; leave out the alpha channel" if image.dim() == 4 and (channels, image.shape[1]) == (3, 4) else ""
        raise ValueError(f"{name} must have shape (B, {channels}, H, W), not {tuple(image.shape)}{hint}")
    if 0 in image.shape:
        raise ValueError(
            f"{name} must have shape (B, {channels}, H, W) with at least one image and one pixel, not {tuple(image.shape)}"
        )
    check_like(name, image, like)
    check_finite(name, image)
    if reading_is_free(image) and (values := bytes_range(image)):
        raise ValueError(f"{name} has values {values}; images are floats in [0, 1]: divide by 255")


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless `tensor` has the dtype and device of the model's parameter `like`."""
    if tensor.dtype != like.dtype:
        hint = "; images are floats in [0, 1]: convert, then divide by 255" if not tensor.is_floating_point() else ""
        raise TypeError(f"{name} must be {like.dtype}, the dtype of the model, not {tensor.dtype}{hint}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but the model is on {like.device}")


def check_latents(latents: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], like: Tensor) -> None:
    """Raise unless `latents` are tensors of these shapes, of the dtype and device of the model, whose parameter `like` is."""
    if isinstance(latents, Tensor) or len(latents) != len(shapes):
        given = f"one of shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else len(latents)
        raise ValueError(f"latents must be {len(shapes)} tensors, of the shapes {', '.join(map(str, shapes))}, not {given}")
    for index, (latent, shape) in enumerate(zip(latents, shapes)):
        if not isinstance(latent, Tensor):
            raise TypeError(f"latents[{index}] must be a tensor, not {type(latent).__name__}")
        if tuple(latent.shape) != shape:
            raise ValueError(f"latents[{index}] must have shape {shape}, not {tuple(latent.shape)}")
        check_like(f"latents[{index}]", latent, like)


def check_count(name: str, value: object) -> None:
    """Raise unless `value` is a whole number of 1 or more."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")


def check_seed(value: object) -> None:
    """Raise unless `value` is a whole number from 0 to 2⁶⁴ - 1."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"seed must be a whole number, not {value!r}")
    if not 0 <= value < 2**64:
        raise ValueError(f"seed must be from 0 to 2⁶⁴ - 1, not {value!r}")


def check_tile(value: object) -> None:
    """Raise unless `value` is "auto", None, or a whole number of 1 or more."""
    if value is None or value == "auto":
        return
    if isinstance(value, str):
        raise ValueError(f"tile must be 'auto', None, or LR pixels a side, not {value!r}")
    check_count("tile", value)


def check_temperature(value: object) -> None:
    """Raise unless `value` is a finite number of 0 or more, or a tensor with one such number."""
    if isinstance(value, (str, bytes)) or not hasattr(type(value), "__float__"):
        raise TypeError(f"temperature must be a number, not {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"temperature must be a number of 0 or more, not {value!r}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise if a CPU tensor has NaN or infinite values."""
    if not reading_is_free(tensor):
        return
    finite = torch.isfinite(tensor)
    if not finite.all():
        raise ValueError(f"{name} has {int((~finite).sum())} NaN or infinite values out of {tensor.numel()}")


def bytes_range(image: Tensor) -> str | None:
    """The range of an image's values as a text if they cannot be in [0, 1], as of bytes converted to floats; else None.

    Such values are far above 1 and hardly below 0; an image decoded from a blown-up state is also far below 0. This function
    waits for the device.
    """
    darkest, brightest = map(float, image.detach().aminmax())
    return f"from {darkest:g} to {brightest:g}" if brightest > _BRIGHTEST and darkest >= _DARKEST else None


def check_pair(hr: Tensor, lr: Tensor, scale: int) -> None:
    """Raise unless `hr` is `scale` times the size of `lr`, image by image."""
    expected = (lr.shape[0], hr.shape[1], lr.shape[2] * scale, lr.shape[3] * scale)
    if tuple(hr.shape) != expected:
        raise ValueError(f"hr must have shape {expected} for lr {tuple(lr.shape)} at scale {scale}, not {tuple(hr.shape)}")


def check_noise(noise: Tensor, lr: Tensor, scale: int, noise_channels: int) -> None:
    """Raise unless `noise` is a noise condition of a model with `noise_channels`."""
    if noise_channels == 0:
        raise ValueError("noise must be None: this model is not conditioned on noise")
    batch, _, height, width = lr.shape
    expected = (batch, noise_channels, height * scale, width * scale) if noise_channels > 1 else (batch, 1, 1, 1)
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise must be a tensor or None, not {type(noise).__name__}")
    if tuple(noise.shape) != expected:
        meaning = "the noise image" if noise_channels > 1 else "the standard deviation of each image's noise"
        raise ValueError(f"noise must be {meaning}, of shape {expected}, not {tuple(noise.shape)}")
