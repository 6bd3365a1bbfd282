"""A model's decoder as a file that programs without this package can run: ONNX, or a package of AOTInductor."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ncsr_fast.decoder import Decoder
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.files import atomic_write

if TYPE_CHECKING:
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

    Example:
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
    reference, decoder = _reference_and_decoder(model, deterministic, clip)
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
    difference = _checked("the ONNX graph", _in_onnxruntime(graph, decoder), decoder, reference) if check else None
    with atomic_write(path) as temporary:
        temporary.write_bytes(graph)
    return difference


def export_package(
    model: NCSR, path: str | os.PathLike, *, deterministic: bool = False, clip: bool = True, check: bool = True
) -> float | None:
    """Write the `Decoder` of a model as a package of AOTInductor in float32, for the processors of this machine.

    The package, a `.pt2` file, is compiled code with the weights: programs load it with PyTorch alone, in Python or C++, and
    without a compiler. Arguments, result and metadata are those of `export_onnx`. Compiling takes a C++ compiler and minutes.
    The code uses the instruction set of this machine's processor, which the metadata name (AOTI_CPU_ISA).

    Args:
        model: The model.
        path: The file to write, whose name ends in .pt2.
        deterministic: As for `Decoder`.
        clip: As for `Decoder`.
        check: Compare the package with the model, as `export_onnx` compares its graph.

    Returns:
        The largest difference found; None without the check.

    Raises:
        ValueError: A name that does not end in .pt2, weights that are not finite, a singular 1×1 convolution, or a package that
            fails the check.
        ImportError: PyTorch is too old to write packages.
        RuntimeError: The compiler failed or is missing.

    Example:
        >>> export_package(NCSR.from_pretrained("ncsr-compact-x4"), "decoder.pt2")
        >>> decoder = torch._inductor.aoti_load_package("decoder.pt2")
        >>> sr = decoder(lr, 0.8 * noise0, 0.8 * noise1)
    """
    if not os.fspath(path).endswith(".pt2"):
        raise ValueError(f"path must end in .pt2, as PyTorch demands of a package, not {os.fspath(path)!r}")
    inductor = importlib.import_module("torch._inductor")
    if not hasattr(inductor, "aoti_compile_and_package"):
        raise ImportError(f"packages of AOTInductor need a newer PyTorch than {torch.__version__}: pip install --upgrade torch")
    reference, decoder = _reference_and_decoder(model, deterministic, clip)
    program = export_program(decoder)
    with atomic_write(path) as temporary, tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        package = inductor.aoti_compile_and_package(
            program,
            package_path=os.path.join(folder, "decoder.pt2"),
            inductor_configs={"aot_inductor.metadata": _metadata(model, decoder)},
        )
        difference = _checked("the package", inductor.aoti_load_package(package), decoder, reference) if check else None
        shutil.copyfile(package, temporary)
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


def _reference_and_decoder(model: NCSR, deterministic: bool, clip: bool) -> tuple[NCSR, Decoder]:
    """A copy of the model in float64, and its decoder in float32, both on the CPU."""
    reference = copy.deepcopy(model).cpu().double().eval()
    return reference, Decoder(reference, deterministic, clip).float()


def _in_onnxruntime(graph: bytes, decoder: Decoder) -> Callable[..., Tensor]:
    """A function that evaluates an ONNX graph of a decoder."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> Tensor:
        named = dict(zip(["lr", *decoder.inputs], (tensor.numpy() for tensor in tensors)))
        return torch.from_numpy(session.run(None, named)[0])

    return run


def _checked(title: str, run: Callable[..., Tensor], decoder: Decoder, reference: NCSR) -> float:
    """The largest difference between an exported decoder and the model. Raises ValueError if it is above the tolerance."""
    difference = _difference(run, decoder, reference)
    if not difference <= _TOLERANCE:
        raise ValueError(f"{title} differs from the model by {difference:.1e}, more than {_TOLERANCE:g}; not written")
    return difference


def _difference(run: Callable[..., Tensor], decoder: Decoder, reference: NCSR) -> float:
    """The largest difference between an exported decoder and the model's reference in float64."""
    reference.options = EngineOptions(engine="plain")
    worst = 0.0
    for sizes in _CHECKED:
        lr, *latents = decoder.example(*sizes)
        found = run(lr, *latents).double()
        latents = latents or [torch.zeros(len(lr), *shape) for shape in reference.latent_shapes(*lr.shape[2:])]
        with torch.no_grad():
            mean = reference.features(lr.double()).prior_mean
            latents = [latent.double() for latent in latents]
            latents[-1] = latents[-1] if mean is None else latents[-1] + mean
            expected = reference.decode(latents, lr.double())
        expected = reference.inputs.shown(expected, lr) if decoder.clip else expected
        gap = torch.where(found.isnan() & expected.isnan(), 0, found - expected).abs().max()
        gap = gap / expected.nan_to_num(0).abs().max().clamp(min=1)
        worst = max(worst, torch.inf if gap.isnan() else gap.item())
    return worst
