"""`ncsr-fast export`: write a model's decoder as an ONNX file or a package of AOTInductor."""

from __future__ import annotations

import argparse

from ncsr_fast.cli._common import check_file, count, path

HELP = "write a model's decoder as an ONNX file or a package of AOTInductor"
EXAMPLE = """\
example:
  ncsr-fast export ncsr-compact-x4 --out decoder.onnx
  ncsr-fast export models/mine --out likely.onnx --deterministic
  ncsr-fast export ncsr-compact-x4 --out decoder.pt2

A name that ends in .pt2 means a package of AOTInductor: code compiled for the processors of this machine, in minutes, which
torch._inductor.aoti_load_package loads without a compiler. Any other name means ONNX.

The inputs are lr (B, 3, H, W), RGB in [0, 1] with even H and W, and latent0, latent1 …, which the caller draws from
N(0, temperature²) in the shapes that the metadata gives. The output is sr. Batch and sizes are free. Before a file is written,
its result is compared with the model's (that of ONNX in onnxruntime); a difference above 1e-4 in a pixel prevents writing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, help="model directory, published .pth, or model name")
    parser.add_argument("--out", required=True, metavar="FILE", type=path, help="file to write, .onnx or .pt2")
    parser.add_argument("--deterministic", action="store_true", help="export a decoder without latents, at temperature 0")
    parser.add_argument("--no-clip", action="store_true", help="do not clip sr to [0, 1]")
    parser.add_argument("--opset", type=count, help="opset of ONNX (default: 18)")
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare with the model; of ONNX the comparison needs onnxruntime"
    )


def run(args: argparse.Namespace) -> None:
    from ncsr_fast.export import export_onnx, export_package
    from ncsr_fast.model import NCSR
    from ncsr_fast.places import check_apart, files_of_model

    out = check_file("--out", args.out)
    if out.suffix == ".pt2" and args.opset is not None:
        raise ValueError(f"--opset is of ONNX, but {out.name} ends in .pt2: leave it out")
    check_apart({"--out": [args.out]}, {"the model": files_of_model(args.model)})
    model = NCSR.from_pretrained(args.model)
    options = {"deterministic": args.deterministic, "clip": not args.no_clip, "check": not args.no_check}
    if out.suffix == ".pt2":
        difference = export_package(model, out, **options)
    else:
        difference = export_onnx(model, out, **options, **({} if args.opset is None else {"opset": args.opset}))
    compared = "not compared" if difference is None else f"largest difference to the model {difference:.1e}"
    print(f"{args.out}: {model.describe()}, {compared}")
