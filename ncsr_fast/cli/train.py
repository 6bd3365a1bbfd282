"""`ncsr-fast train`: train a model on a folder of images, or resume a run."""

from __future__ import annotations

import argparse

from ncsr_fast.cli._common import add_device, pick_device
from ncsr_fast.config import PRESETS, NCSRConfig

HELP = "train a model on a folder of images"
EXAMPLE = """\
example:
  ncsr-fast train photos/ --run runs/mine --preset ncsr-compact-x4 --validation more_photos/

Two stages: the encoder by L1, then the flow by its negative log-likelihood, with the encoder frozen for the
first half of it. The same command again resumes a run that was stopped. The model ends up in RUN/model, for
`ncsr-fast sample --model RUN/model` or NCSR.from_pretrained("RUN/model")."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", help="folder of HR images (png, jpg, webp, bmp), searched recursively")
    parser.add_argument("--run", required=True, help="folder of the run: log, checkpoints, samples, model")
    parser.add_argument("--preset", default="ncsr-x4", choices=PRESETS, help="architecture, and the settings that go with it")
    parser.add_argument("--lr-images", help="folder of the LR counterparts (default: MATLAB bicubic of the crops)")
    parser.add_argument("--validation", help="folder of HR images to validate on (default: look at training images)")
    parser.add_argument(
        "--encoder-weights", help="what the encoder starts from: a published RRDB or ESRGAN .pth, or RUN/encoder"
    )
    parser.add_argument("--start-from", help="fine-tune this model: a directory, published .pth or shipped name")
    parser.add_argument("--encoder-steps", type=int, help="steps of the first stage, 0 to skip it")
    parser.add_argument("--steps", type=int, help="steps of the second stage")
    parser.add_argument("--batch", type=int, help="crops a step")
    parser.add_argument("--crop", type=int, help="side of an HR crop")
    parser.add_argument("--encoder-lr", type=float, help="learning rate of the first stage")
    parser.add_argument("--lr", type=float, help="learning rate of the second stage")
    parser.add_argument("--max-std", type=float, help="M: noise of standard deviation U(0, M) is added")
    parser.add_argument("--l1-weight", type=float, help="weight of the L1 error of temperature-0 samples beside the NLL")
    parser.add_argument("--unfreeze", type=float, help="fraction of the second stage after which the encoder is trained too")
    parser.add_argument("--seed", type=int, help="of weights, crops and noise")
    parser.add_argument("--validate-every", type=int, help="steps between validations")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default 0: this one)")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from ncsr_fast.training.loop import train
    from ncsr_fast.training.settings import PUBLISHED, TrainSettings

    given = {key: value for key, value in vars(args).items() if key in TrainSettings.__dataclass_fields__ and value is not None}
    settings = TrainSettings(config=NCSRConfig.preset(args.preset), **{**PUBLISHED[args.preset], **given})
    train(settings, args.run, device=pick_device(args.device), workers=args.workers)
    print(f"the model is in {args.run}/model")
