"""Perceptual distance and the diversity of samples, as the NTIRE 2021 challenge measures them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast.memory import is_out_of_memory
from ncsr_fast.ops.conv3x3 import ConvolutionMethod, convolution
from ncsr_fast.precision import true_float32

_EPSILON = 1e-10  # of LPIPS' unit-length features
_METHOD = ConvolutionMethod()
_BAND_VALUES = 2**17  # features that distances are computed of at a time on a CPU, so that they stay in its cache


def diversity_score(distances: Tensor) -> float:
    """The gain in percent of choosing the best sample at every pixel over the best single sample (0 if all are the same).

    Source: the NTIRE 2021 "Learning the Super-Resolution Space" toolkit.

    Args:
        distances: (n, H, W), a map of each sample's distance to the original; lower is better. LPIPS maps (`lpips`) give the
            challenge's score.

    Returns:
        `100 · (global - local) / global`: `global` is the smallest mean of a map, `local` the mean of the pixelwise
        smallest distance.
    """
    if distances.dim() != 3 or distances.shape[0] < 1:
        raise ValueError(f"distances must have shape (n, H, W) with n ≥ 1, not {tuple(distances.shape)}")
    best = distances.flatten(1).mean(dim=1).min()
    local = distances.min(dim=0).values.mean()
    return relative_gain(float(best), float(local))


def relative_gain(best: float, local: float) -> float:
    """The diversity score in percent, of the best sample's mean distance and the mean of the pixelwise smallest ones."""
    return 100 * (best - local) / best if best > 0 else 0.0


def error_maps(samples: Tensor, target: Tensor, window: int = 16) -> Tensor:
    """Mean squared error of each sample (n, 3, H, W) to `target` (3, H, W) in the windows of a grid, (n, h, w).

    `diversity_score` can be computed from these maps without LPIPS; it is then not comparable to published scores.
    """
    error = (samples - target).square().mean(dim=1, keepdim=True)
    window = min(window, *error.shape[2:])
    return F.avg_pool2d(error, window)[:, 0]


class LPIPSUnavailable(RuntimeError):
    """LPIPS cannot be computed here; the message says why."""


def lpips_model(network: str = "alex", device: torch.device | str = "cpu"):
    """The LPIPS network (Zhang et al. 2018), spatial, from the `lpips` package.

    Raises:
        LPIPSUnavailable: The package, torchvision or the backbone's weights (a download) are missing.
    """
    try:
        package = lpips_package()
    except ImportError as error:
        raise LPIPSUnavailable(f"LPIPS needs the lpips package: pip install 'ncsr_fast[eval]' ({error})") from error
    except RuntimeError as error:
        raise LPIPSUnavailable(f"LPIPS needs a torchvision that fits torch {torch.__version__}: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The parameter 'pretrained'|Arguments other than a weight enum")
            return package.LPIPS(net=network, spatial=True, verbose=False).to(device).eval()
    except OSError as error:
        raise LPIPSUnavailable(f"LPIPS could not download the weights of {network!r}: {error}") from error


def lpips_package() -> ModuleType:
    """The package. It imports torchvision, of which it uses networks that are plain PyTorch.

    Where the compiled operators of torchvision do not fit this torch, "operator torchvision::nms does not exist" ends its
    import. Then those that it registers kernels for at import are declared first: LPIPS calls none of them.
    """
    try:
        import lpips as package
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        import lpips as package
    return package


_DECLARED: list[torch.library.Library] = []  # a library undoes its declarations when nothing refers to it


def lpips_digest(model: Any) -> str | None:
    """SHA-256 of the weights of an LPIPS network, by which reports can be told to rest on the same; None of what has none."""
    if not isinstance(model, nn.Module):
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def lpips(samples: Tensor, target: Tensor, model) -> Tensor:
    """LPIPS maps (n, H, W) of `samples` (n, 3, H, W) against `target` (3, H, W), floats in [0, 1].

    Args:
        samples: (n, 3, H, W).
        target: (3, H, W).
        model: From `lpips_model`; the mean of a map is the LPIPS distance of that sample.

    Raises:
        ValueError: The images are too small for the network.
    """
    return LPIPSReference(target, model)(samples)


class LPIPSReference:
    """An original, whose features any number of samples are compared to: those of AlexNet are computed once.

    Args:
        target: (3, H, W), floats in [0, 1], on the device of the network.
        model: From `lpips_model`; or another distance, a function of samples and targets (n, 3, H, W) in [-1, 1] that returns
            maps (n, 1, H, W).

    Raises:
        ValueError: The image is too small for the network.
    """

    def __init__(self, target: Tensor, model: Any) -> None:
        self._model, self._target = model, target
        self._features = self._measured(lambda: _unit_features(model, target[None])) if hasattr(model, "lins") else None

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """LPIPS maps (n, H, W) of samples (n, 3, H, W), floats in [0, 1]. Raises ValueError as above."""
        if self._features is None:
            target = (self._target * 2 - 1).expand_as(samples)
            return self._measured(lambda: self._model(samples * 2 - 1, target))[:, 0]
        return self._measured(lambda: _distances(self._model, samples, self._features))

    @torch.no_grad()
    def _measured(self, call):
        """The result of `call`; an error of shapes as one of the image."""
        try:
            with true_float32(self._target):
                return call()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            height, width = self._target.shape[1:]
            raise ValueError(f"LPIPS cannot measure images of {height}×{width} pixels: {error}") from error


def _features(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The layers' outputs (n, C, h, w), channels-last, of images (n, 3, H, W) in [0, 1], by the modules of the network."""
    x = model.scaling_layer(images * 2 - 1).contiguous(memory_format=torch.channels_last)
    found = []
    for layer in range(1, model.L + 1):
        for module in getattr(model.net, f"slice{layer}"):
            x = _applied(module, x)
        found.append(x)
    return found


def _applied(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == module.padding == (1, 1):
        return convolution(x, module.weight, module.bias, _METHOD)  # Winograd's algorithm on a CPU
    return module(x)


def _unit_features(model: nn.Module, images: Tensor) -> list[Tensor]:
    return [_unit(_pixels(features)) for features in _features(model, images)]


def _pixels(features: Tensor) -> Tensor:
    """(n, C, h, w) → (n · h · w, C), a view of channels-last features."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def _unit(features: Tensor) -> Tensor:
    """Features (pixels, C) of unit length."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt_() + _EPSILON)


def _distances(model: nn.Module, samples: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Maps (n, H, W): the distances of every layer, enlarged and added."""
    count, _, height, width = samples.shape
    total = samples.new_zeros(count, 1, height, width)
    for features, target, layer in zip(_features(model, samples), targets, model.lins):
        weight = layer.model[-1].weight.flatten()
        small = torch.stack([_layer_distance(_pixels(one[None]), target, weight) for one in features])
        small = small.view(count, 1, *features.shape[2:])
        total += F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
    return total[:, 0]


def _layer_distance(features: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared distance (pixels,) of features (pixels, C) to those of the original, which have unit length."""
    band = len(features) if features.is_cuda else max(1, _BAND_VALUES // features.shape[1])
    pairs = zip(features.split(band), target.split(band))
    return torch.cat([(_unit(part) - other).square_() @ weight for part, other in pairs])
