"""The decoder of a model as a graph of PyTorch's own operators, for torch.export and ONNX.

Everything that depends on the weights alone is a constant of the graph: actnorms and exp-scales are folded into the
convolutions, and the 1×1 convolutions are inverted. The remaining operations are convolutions, ReLUs, and one sigmoid and one
division per coupling.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast.config import NCSRConfig
from ncsr_fast.engine.folding import Networks, fold_mixing, fold_networks, is_deep
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.engine.plan import folded_split
from ncsr_fast.files import atomic_write
from ncsr_fast.flow.walk import downward
from ncsr_fast.ops.conv3x3 import convolution

if TYPE_CHECKING:
    from ncsr_fast.flow.level import FlowLevel
    from ncsr_fast.model import NCSR

_OPSET = 18
_TOLERANCE = 1e-4  # of the largest pixel, where that is more than 1
# batch, and height and width as multiples of the least: nothing alike, and none of it 1, which torch.export would take for a
# constant
_EXAMPLE = (2, 3, 4)
_CHECKED = ((1, 2, 3), (3, 5, 2))  # none of them the example's


def export_onnx(
    model: NCSR,
    path: str | os.PathLike,
    *,
    deterministic: bool = False,
    clip: bool = True,
    opset: int = _OPSET,
    check: bool = True,
) -> float | None:
    """Write the `Decoder` of a model as an ONNX file in float32.

    The inputs are "lr" and, unless deterministic, "latent0" …; the output is "sr" (see `Decoder`). Batch, height and width are
    dynamic. The file is written under a temporary name and renamed. Its metadata are texts:

    * "scale", "clip", "deterministic";
    * "latents": JSON with the name, channels and scale of each latent, whose shape is (B, channels, scale·H, scale·W);
    * "lr_multiple": H and W must be multiples of it;
    * "config": JSON of the `NCSRConfig`;
    * "ncsr_fast": the version of this package.

        >>> export_onnx(NCSR.from_pretrained("ncsr-compact-x4"), "decoder.onnx")
        >>> session = onnxruntime.InferenceSession("decoder.onnx")
        >>> sr, = session.run(None, {"lr": lr, "latent0": 0.8 * noise0, "latent1": 0.8 * noise1})

    Args:
        model: The model.
        path: The file to write.
        deterministic: As for `Decoder`.
        clip: As for `Decoder`.
        opset: The ONNX opset, 18 or more.
        check: Compare the graph in onnxruntime with the model's reference in float64, at other sizes and batches than it was
            traced with. The file is not written if a pixel differs by more than 1e-4 (relative to the largest pixel, if that is
            above 1).

    Returns:
        The largest difference found; None without the check.

    Raises:
        ValueError: Weights that are not finite, a singular 1×1 convolution, an opset that the exporter does not have, or a
            graph that fails the check.
        ImportError: A package of the extra `export` is missing, or PyTorch is too old to export.
    """
    for name in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"writing ONNX needs {name}: pip install 'ncsr_fast[export]'") from error
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not _OPSET <= opset <= newest:
        raise ValueError(f"opset must be from {_OPSET} to {newest}, the newest of the installed onnx, not {opset!r}")
    reference = copy.deepcopy(model).cpu().double().eval()
    decoder = Decoder(reference, deterministic, clip).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        program = torch.onnx.export(
            export_program(decoder),
            dynamic_shapes=decoder.dynamic_shapes(),
            input_names=["lr", *decoder.inputs],
            output_names=["sr"],
            opset_version=opset,
            verbose=False,
        )
    if program.model.opset_imports.get("") != opset:  # the exporter only logs this
        raise ValueError(f"the exporter of torch {torch.__version__} cannot write opset {opset}; leave it at {_OPSET}")
    program.model.metadata_props.update(_metadata(model, decoder))
    graph = program.model_proto.SerializeToString()
    difference = _difference(graph, decoder, reference) if check else None
    if difference is not None and not difference <= _TOLERANCE:
        raise ValueError(f"the ONNX graph differs from the model by {difference:.1e}, more than {_TOLERANCE:g}; not written")
    with atomic_write(path) as temporary:
        temporary.write_bytes(graph)
    return difference


def export_program(decoder: Decoder) -> torch.export.ExportedProgram:
    """The decoder as torch.export has it, for any batch, and any height and width of LR that are 2, 3 … times `multiple`.

    Raises:
        ImportError: PyTorch is 2.4, whose torch.export cannot follow the sizes through the model.
    """
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        raise ImportError(f"exporting needs a newer PyTorch than {torch.__version__}: pip install --upgrade torch")
    lr, *latents = decoder.example(*_EXAMPLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        return torch.export.export(decoder, (lr, *latents), dynamic_shapes=decoder.dynamic_shapes())


def _metadata(model: NCSR, decoder: Decoder) -> dict[str, str]:
    from ncsr_fast import __version__

    latents = [
        {"name": name, "channels": channels, "scale": side / decoder.multiple}
        for name, (channels, side) in zip(decoder.inputs, decoder.latents)
    ]
    return {
        "ncsr_fast": __version__,
        "scale": str(model.config.scale),
        "latents": json.dumps(latents),
        "clip": json.dumps(decoder.clip),
        "deterministic": json.dumps(decoder.deterministic),
        "lr_multiple": str(decoder.multiple),
        "config": json.dumps(model.config.to_dict()),
    }


def _difference(graph: bytes, decoder: Decoder, reference: NCSR) -> float:
    """The largest difference between the graph in onnxruntime and the model's reference in float64."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    reference.options = EngineOptions(engine="plain")
    worst = 0.0
    for sizes in _CHECKED:
        lr, *latents = decoder.example(*sizes)
        found = session.run(None, dict(zip(["lr", *decoder.inputs], (t.numpy() for t in (lr, *latents)))))[0]
        latents = latents or [torch.zeros(len(lr), *shape) for shape in reference.latent_shapes(*lr.shape[2:])]
        with torch.no_grad():
            mean = reference.features(lr.double()).prior_mean
            latents = [latent.double() for latent in latents]
            latents[-1] = latents[-1] if mean is None else latents[-1] + mean
            expected = reference.decode(latents, lr.double())
        expected = reference.inputs.shown(expected, lr) if decoder.clip else expected
        found = torch.from_numpy(found).double()
        gap = torch.where(found.isnan() & expected.isnan(), 0, found - expected).abs().max()
        gap = gap / expected.nan_to_num(0).abs().max().clamp(min=1)
        worst = max(worst, torch.inf if gap.isnan() else gap.item())
    return worst


class Decoder(nn.Module):
    """`decoder(lr, *latents)` → sr (B, 3, sH, sW), what `model.decode(latents, lr)` computes: the noise condition is zero.

    It has copies of the weights, as buffers: changes of the model do not reach it. No gradients of the weights.

    Args:
        lr: (B, 3, H, W), RGB in [0, 1], or as the model wants it; H and W multiples of `multiple`, for most models even
            (`NCSR` pads others; here it is left to the caller).
        latents: As `model.latent_shapes(H, W)` has them, drawn from N(0, temperature²), the top one around the mean of the
            prior where the model has one; with `deterministic` there are none: they are zero, and `decoder(lr)` is the image
            of temperature 0.
        clip: To [0, 1] as `model.sample` does, which adds the base before where the model has one: a pixel that overflowed is
            NaN. False: as `model.decode` does.

    Raises:
        ValueError: Weights that are not finite, or a 1×1 convolution without an inverse.
    """

    def __init__(self, model: NCSR, deterministic: bool = False, clip: bool = True) -> None:
        super().__init__()
        if not isinstance(model.config, NCSRConfig):
            raise ValueError("only models of an NCSRConfig can be exported, and this model has a FlowConfig")
        self.deterministic, self.clip = deterministic, clip
        self.multiple, self.lr_channels = model.flow.lr_multiple, model.flow.lr_channels
        self.base = model.flow.base if clip else None
        shapes = model.latent_shapes(self.multiple, self.multiple)
        self.latents = [(channels, side) for channels, side, _ in shapes]  # side to `multiple` LR pixels
        self.inputs = [] if deterministic else [f"latent{index}" for index in range(len(self.latents))]  # beside lr
        self.encoder = copy.deepcopy(model.encoder)
        _drop(self.encoder, self.encoder.head())
        with torch.no_grad():
            self.levels = nn.ModuleList(_Level(level) for level in model.levels)
        self.eval().requires_grad_(False)
        for name, value in self.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"the model cannot be exported: {name}, computed from its weights, is not finite")

    def example(self, batch: int, rows: int, columns: int) -> list[Tensor]:
        """Return lr, of `multiple` times these rows and columns, and latents: a smooth image, temperature 0.5."""
        like, generator = self.encoder.conv_first.weight, torch.Generator().manual_seed(0)
        corners = torch.rand(batch, self.lr_channels, 2, 2, generator=generator, device="cpu")
        lr = F.interpolate(corners, size=(self.multiple * rows, self.multiple * columns), mode="bilinear")
        latents = [
            0.5 * torch.randn((batch, channels, side * rows, side * columns), generator=generator, device="cpu")
            for channels, side in self.latents[: len(self.inputs)]
        ]
        return [tensor.to(like) for tensor in (lr, *latents)]

    def dynamic_shapes(self) -> dict[str, Any]:
        """What torch.export is told: batch, and height and width of LR over `multiple`, are free."""
        batch, h, w = torch.export.Dim("batch", min=1), torch.export.Dim("h", min=2), torch.export.Dim("w", min=2)
        latents = tuple({0: batch, 2: side * h, 3: side * w} for _, side in self.latents[: len(self.inputs)])
        return {"lr": {0: batch, 2: self.multiple * h, 3: self.multiple * w}, **({"latents": latents} if latents else {})}

    def forward(self, lr: Tensor, *latents: Tensor) -> Tensor:
        """The HR images (B, 3, sH, sW) of LR images and latents."""
        if self.deterministic:
            sizes = lr.shape[2] // self.multiple, lr.shape[3] // self.multiple
            latents = tuple(lr.new_zeros(lr.shape[0], c, *(side * size for size in sizes)) for c, side in self.latents)
        features, mean = self.encoder.condition(lr, None)
        z = latents[-1] if mean is None else latents[-1] + mean
        for index, level, latent in downward(self.levels, latents):
            z = level(z, latent, features[index].joined)
        if self.base is not None:
            z = z + F.interpolate(lr, size=z.shape[2:], mode=self.base, align_corners=False)
        return torch.where(z.isfinite(), z.clamp(0, 1), torch.nan) if self.clip else z


def _drop(module: nn.Module, parts: list[nn.Module]) -> None:
    """Put an identity in the place of modules inside a module, which has no use for them."""
    for name, child in module.named_children():
        if any(child is part for part in parts):
            setattr(module, name, nn.Identity())
        else:
            _drop(child, parts)


class _Level(nn.Module):
    """`FlowLevel.decode` with zero noise and without the log-det: state of the next level → state of this level's input."""

    def __init__(self, level: FlowLevel) -> None:
        super().__init__()
        self.eps, self.squeeze, self.split_channels = level.eps, level.squeeze, level.split_channels
        dtype = level.actnorm_bias.dtype
        pairs = [
            fold_networks(level.networks(branch), 0 if branch.changes_all else level.pass_through, dtype)
            for branch in level.branches
        ]
        residuals = [level.networks(branch).residual for branch in level.branches]
        mixing = fold_mixing(level.actnorm_bias, level.actnorm_logs, level.invconv, level.transition_steps, inverse=True)
        self.split = _Convolution(*_halves(*folded_split(level))) if level.split_channels else None
        self.changed = level.channels - level.pass_through
        hoisted = [hoisted for branch, (_, hoisted) in zip(level.branches, pairs) if branch.condition == "features"]
        # the part of all networks' first layers that sees u: one convolution
        self.hoisted = _Convolution(torch.cat([h.weight for h in hoisted]), torch.cat([h.bias for h in hoisted]))
        self.hoists = [branch.condition == "features" for branch in level.branches]
        self.branches = [branch.name for branch in level.branches]
        for name, (networks, hoisted), hoists, residual in zip(self.branches, pairs, self.hoists, residuals):
            biases = hoisted.bias.chunk(len(networks.w2))
            # of zero noise, or of no condition, only the bias of the first layer is left
            parts = (_Network(networks, index, residual, None if hoists else bias) for index, bias in enumerate(biases))
            setattr(self, name, nn.ModuleList(parts))
        self.mixes = nn.ModuleList(
            _Convolution(mix[:, :, None, None], offset) for mix, offset in zip(mixing.mix, mixing.offset)
        )

    def forward(self, z: Tensor, latent: Tensor | None, u: Tensor) -> Tensor:
        if self.split is not None:
            mean, logs = self.split(z).chunk(2, dim=1)
            z = torch.cat([z, mean + torch.exp(logs) * latent], dim=1)
        branches = [getattr(self, name) for name in self.branches]
        count = sum(len(networks) for networks, hoists in zip(branches, self.hoists) if hoists)
        hoisted = iter(self.hoisted(u).chunk(count, dim=1))
        pres = [[next(hoisted) if hoists else None for _ in networks] for networks, hoists in zip(branches, self.hoists)]
        for left in range(1, len(self.mixes) + 1):
            for networks, own in reversed(list(zip(branches, pres))):
                if left <= len(networks):
                    z = self._undo(networks[len(networks) - left], z, own[len(networks) - left])
            z = self.mixes[len(self.mixes) - left](z)
        return F.pixel_shuffle(z, self.squeeze) if self.squeeze > 1 else z

    def _undo(self, network: _Network, z: Tensor, pre: Tensor | None) -> Tensor:
        """The inverse of a branch's affine map, z / scale - shift, for the channels that the branch changes."""
        pass_through = z.shape[1] - self.changed if network.sees_state else 0
        z1, z2 = z[:, :pass_through], z[:, pass_through:]
        shift, raw = network(z1 if pass_through else None, pre).chunk(2, dim=1)
        z2 = z2 / (torch.sigmoid(raw) + self.eps) - shift
        return torch.cat([z1, z2], dim=1) if pass_through else z2


class _Network(nn.Module):
    """One of the stacked networks: (z1, pre) → shift and, shifted by 2, what the scale is the sigmoid of.

    Args:
        residual: Of a deep network with residuals, the layers inside each; 0: none.
        bias: Of the first layer, where nothing is hoisted from it.
    """

    def __init__(self, networks: Networks, index: int, residual: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.sees_state, self.residual = networks.w1 is not None, residual
        self.first = _Convolution(networks.w1[index], bias) if self.sees_state else None
        w2, b2 = networks.w2[index], networks.b2[index]
        layers = zip(w2, b2) if is_deep(networks.w2) else [(w2, b2)]
        self.hidden = nn.ModuleList(_Convolution(*layer) for layer in layers)
        weight, bias = _halves(networks.w3[index], networks.b3[index])
        bias[len(bias) // 2 :] += 2
        self.last = _Convolution(weight, bias)

    def forward(self, z1: Tensor | None, pre: Tensor | None) -> Tensor:
        x = pre if z1 is None else self.first(z1) if pre is None else self.first(z1) + pre
        x = start = F.relu(x)
        for index, layer in enumerate(self.hidden, start=1):
            x = F.relu(layer(x))
            if self.residual and index % self.residual == 0:
                x = start = start + x
        return self.last(x)


class _Convolution(nn.Module):
    """A convolution that preserves the size, with constant weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return convolution(x, self.weight, self.bias, None)


def _halves(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution with its even outputs first, then the odd ones; the published order alternates shifts and scales."""
    return torch.cat([weight[0::2], weight[1::2]]), torch.cat([bias[0::2], bias[1::2]])
