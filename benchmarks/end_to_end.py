"""Sampling time of a whole model beside the published program, results compared first.

    python benchmarks/end_to_end.py --published PATH_TO_A_CHECKOUT_OF_NCSR      # with ncsr_fast installed

One row: n samples of one LR image by the published ×4 architecture with random weights (time does not depend on
them), the two programs alternating in one process. Printed, and written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from provenance import provenance  # beside this script

from ncsr_fast import NCSR, NCSRConfig

RESULTS = Path(__file__).parent / "results"
OPTIONS = {  # the part of the published 4X.yml that decides the architecture
    "scale": 4,
    "mode": "softflow",
    "network_G": {
        "which_model_G": "NCSRNet",
        "flow": {
            "K": 16, "L": 3, "S": [0, 16, 16], "std_channels": 3, "coupling": "CondAffineSeparatedAndCond",
            "additionalFlowNoAffine": 2, "split": {"enable": True}, "fea_up0": True,
            "stackRRDB": {"blocks": [1, 8, 15, 22], "concat": True},
        },
    },
}  # fmt: skip


def published_network(checkout: Path) -> torch.nn.Module:
    """The published NCSRNet. What its utilities import and a network does not use is stubbed where it is missing."""
    sys.path.insert(0, str(checkout / "code"))
    for name in ("cv2", "natsort", "yaml", "torchvision", "torchvision.utils"):
        try:
            __import__(name)
        except (ImportError, RuntimeError):
            sys.modules[name] = mock.MagicMock()
    from models.modules.NCSRNet_arch import NCSRNet

    return NCSRNet(3, 3, 64, 23, gc=32, scale=4, K=16, opt=OPTIONS).eval()


def random_model() -> NCSR:
    """The ×4 model with its parameters moved gently off their initial values and its actnorms initialised."""
    torch.manual_seed(0)
    model = NCSR(NCSRConfig.from_published(OPTIONS)).eval()
    with torch.no_grad():
        for level in model.levels:
            for parameter in level.parameters():
                parameter += 3e-3 * torch.randn_like(parameter)
    model.initialize(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 16, 16))
    return model


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, required=True, help="checkout of the published NCSR repository")
    parser.add_argument("--size", type=int, default=40, help="side of the LR image (default: %(default)s)")
    parser.add_argument("--n", type=int, default=10, help="samples (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON row (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False

    ours, theirs = random_model(), published_network(args.published)
    theirs.load_state_dict(ours.published_state_dict())
    ours, theirs = ours.to(args.device), theirs.to(args.device)
    torch.set_default_device(args.device)
    lr = torch.rand(1, 3, args.size, args.size)
    shapes = ours.latent_shapes(args.size, args.size)
    noise = torch.zeros(1, 1, 1, 1)

    # sampling as their test program does it: the encoder anew for every sample, split latents drawn inside
    def their_samples() -> None:
        for _ in range(args.n):
            theirs(lr=lr, z=0.9 * torch.randn(1, *shapes[-1]), eps_std=0.9, reverse=True, std=noise)

    def our_samples() -> None:
        ours.sample(lr, n=args.n, temperature=0.9)

    latents = [0.9 * torch.randn(1, *shape) for shape in shapes]
    expected, _ = theirs(lr=lr, z=None, epses=list(latents), reverse=True, std=noise)
    error = float((ours.decode(latents, lr) - expected).abs().max() / expected.abs().max())
    if not error < 2e-5:
        sys.exit(f"the two programs decode the same latents differently (relative error {error:.1e}): nothing is timed")

    their_samples(), our_samples()  # warm-up
    times = [(seconds(their_samples), seconds(our_samples)) for _ in range(args.rounds)]
    row = {
        "what": f"{args.n} samples, LR {args.size}×{args.size}, ncsr-x4 (41.7 M parameters), float32",
        "published_s": statistics.median(published for published, _ in times),
        "ncsr_fast_s": statistics.median(own for _, own in times),
        "speed_up": statistics.median(published / own for published, own in times),
        "speed_up_range": [min(a / b for a, b in times), max(a / b for a, b in times)],
        "relative_error": error,
        **provenance(args.device),
        "command": f"python benchmarks/end_to_end.py --published PATH --size {args.size} --n {args.n} "
        f"--rounds {args.rounds} --threads {args.threads} --device {args.device}",
    }
    print(json.dumps(row, indent=2, ensure_ascii=False))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"sampling-{args.device}.json").write_text(json.dumps(row, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
