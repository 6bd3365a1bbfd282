"""The NCSR model (Kim & Son 2021): a flow on the HR image, conditioned on the LR image and on the added noise."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncsr_fast import files
from ncsr_fast.autocast import without_autocast
from ncsr_fast.checkpoints import models, published
from ncsr_fast.checkpoints.state_dicts import read_state_dict
from ncsr_fast.checks import check_temperature
from ncsr_fast.config import FlowConfig, NCSRConfig
from ncsr_fast.encoder.rrdb import RRDB
from ncsr_fast.engine.condition import Condition
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.flow.conditioned import Encoded, Levels
from ncsr_fast.flow.inputs import Inputs
from ncsr_fast.flow.level import FlowLevel
from ncsr_fast.flow.samples import ConditionedFlow
from ncsr_fast.freezing import Freezer
from ncsr_fast.hub import find_model
from ncsr_fast.invertibility import InvertibilityReport, check_invertibility
from ncsr_fast.layout import laid_out


def _option(name: str, meaning: str) -> property:
    """A property of a model that reads and writes one field of its `options`."""

    def write(model: NCSR, value: Any) -> None:
        model.options = replace(model.options, **{name: value})

    return property(lambda model: getattr(model.options, name), write, doc=meaning)


class NCSR(nn.Module):
    """NCSR or SRFlow super-resolution flow, or another flow of the family.

    The flow sees `lr` (B, 3, H, W) and `hr` (B, 3, sH, sW) as they are given: float RGB in [0, 1], of the model's dtype and
    device, with the noise of training already added by the caller (`ncsr_fast.data.perturb`). `noise` conditions the flow on
    that noise. Its shape is (B, 3, sH, sW) when the configuration's `noise_channels` is 3, and (B, 1, 1, 1) when it is 1; None
    means zero.

    LR images of any size from 1×1 up are accepted. Odd sizes are padded to even ones (by reflection; a single row or column is
    replicated), returned images are cropped back, and latents and likelihoods are those of the padded image.

    Everything is differentiable with respect to images and parameters. `model(hr, lr, noise)` is `model.nll(hr, lr, noise)`.
    Under `torch.autocast` the networks run at autocast's precision, as with the option `precision`, and the state stays
    float32.

    Args:
        config: An architecture of the published models (`NCSRConfig`), or a `FlowConfig`, which needs an encoder.
        encoder: A module that makes the condition of LR images (`ncsr_fast.engine.condition.Encoder`). None: the RRDB network
            that an `NCSRConfig` describes.
        options: Fields of `EngineOptions`: `engine`, `precision`, `checkpoint` … They are also arguments of `from_pretrained`,
            and can be changed at any time: `model.precision = "bf16"`, `model.options = replace(model.options, …)`.
    """

    def __init__(self, config: NCSRConfig | FlowConfig, encoder: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config
        self.flow = config.flow if isinstance(config, NCSRConfig) else config
        self.options = EngineOptions(**options)
        self.encoder = _rrdb(config) if encoder is None else encoder
        flow = self.flow
        self.levels = nn.ModuleList(
            FlowLevel(level, channels, flow.hidden_channels, flow.noise_channels, flow.eps)
            for level, channels in zip(flow.levels, flow.level_channels())
        )
        # persistent, so that a reloaded model is not initialised again from whatever batch comes first
        self.register_buffer("actnorm_initialized", torch.tensor(False))
        self.unused_published: dict[str, Tensor] = {}  # tensors of a published file that no computation reads
        self._freezer = Freezer()

    engine = _option("engine", 'Evaluation of the model: "fused", the engine, or "plain", the reference, step by step.')
    precision = _option("precision", 'Precision of the networks: "fp32", "tf32" or "bf16".')
    checkpoint = _option("checkpoint", "True if the backward pass recomputes hidden layers instead of saving them.")

    @property
    def served(self) -> EngineOptions:
        """The options in force for a call made now: `options`, under `torch.autocast` with autocast's precision."""
        return self.options.under_autocast(self.inputs.like)

    @property
    def inputs(self) -> Inputs:
        """The checks and the padding of arguments."""
        return Inputs(self.flow, self.levels[0].actnorm_bias)

    def condition(self, lr: Tensor) -> ConditionedFlow:
        """The flow conditioned on LR images, with everything that depends on the LR images alone computed once.

        Use this method to evaluate many HR images for the same LR image, for example samples, or the iterates of a solver of an
        inverse problem. Gradients flow to the weights and to `lr` only if autograd records when this method is called.
        Conditioned under `torch.no_grad()`, the flow still gives gradients of latents and HR images, without evaluating the
        encoder again.

        Args:
            lr: (B, 3, H, W).

        Returns:
            A `ConditionedFlow`, with `sample`, `encode`, `decode` and `log_prob`. It is valid for the current weights: its
            calls raise RuntimeError after a weight has changed. (With `engine="plain"` every call records gradients of the
            weights.)

        Raises:
            ValueError, TypeError: As `encode` does for lr.

        Example:
            >>> with torch.no_grad():
            ...     flow = model.condition(lr)
            >>> latents = [torch.zeros(1, *shape, requires_grad=True) for shape in model.latent_shapes(*lr.shape[2:])]
            >>> loss = (flow.decode(latents) - target).square().mean()
        """
        return self._condition(lr, keeps=True)

    def encode(self, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Encoded:
        """Latents and log-likelihood of `hr` given `lr`.

        Args:
            hr: (B, 3, sH, sW).
            lr: (B, 3, H, W).
            noise: Noise condition, or None for zero.

        Returns:
            An `Encoded`. `.latents` is a tuple: the latents of the splits in encoding order, then the top latent. All latents
            are standard normal under the model, unless the prior of the top latent has a mean, `.prior_mean`. `.log_likelihood`
            (B,) is `log p(hr | lr) = Σ log|det| + Σ log N(latent; 0, 1)` in nats.

        Raises:
            ValueError, TypeError: A wrong shape, dtype or device, HR and LR sizes that do not fit the scale, or (for CPU
                tensors) NaN or infinite values; the message names the argument.
        """
        return self._condition(lr).encode(hr, noise)

    def forward(self, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return `nll(hr, lr, noise)`, so that training, module wrappers, hooks and `torch.compile` can call the model."""
        return self.nll(hr, lr, noise)

    def nll(self, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Tensor:
        """Negative log-likelihood (B,) in bits per HR pixel *position*, `-log p / (ln 2 · H · W)`.

        H and W are the sides of the padded HR image. As in the published programs, the value is not divided by the three
        channels.
        """
        return _bits(self.encode(hr, lr, noise), self.inputs.padded_pixels(lr))

    @torch.no_grad()
    def initialize(self, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Tensor:
        """Set every actnorm from one batch, in encoding order, and return the batch's `nll` (B,).

        Each actnorm, also inside the networks, then gives its input zero mean and unit variance per channel.
        """
        self._freezer.refuse("initialize()")
        inputs = self.inputs
        small = inputs.lr(lr)
        x, noise = inputs.hr(hr, lr), inputs.noise(noise, lr)
        with without_autocast(lr.device.type):  # statistics are float32
            condition = self.features(small, plain=True)
            encoded = Levels(self.levels, self.flow, condition, self.options, keeps=False).initialized(x, noise)
        self.actnorm_initialized.fill_(True)
        return _bits(encoded, inputs.padded_pixels(lr))

    def decode(self, latents: Sequence[Tensor], lr: Tensor, noise: Tensor | None = None) -> Tensor:
        """The HR images (B, 3, sH, sW) of latents, not clipped to [0, 1]; the inverse of `encode`.

        Raises:
            ValueError: The latents do not have the shapes for an image of this size (`latent_shapes`).
        """
        return self._condition(lr).decode(latents, noise)

    def sample(
        self,
        lr: Tensor,
        n: int = 10,
        temperature: float = 0.9,
        generator: torch.Generator | None = None,
        *,
        on_nonfinite: str = "warn",
    ) -> Tensor:
        """n super-resolved images (B, n, 3, sH, sW) of each LR image, clipped to [0, 1].

        Latents are drawn from N(0, temperature²) on the model's device: the same seed gives the same images, and the first m
        samples do not depend on n. The noise condition is zero, as in the published programs. Whatever depends on the LR image
        alone is computed once for all its samples.

        The inverse of a flow can explode. A non-finite pixel is NaN, never silently black or white.

        Call this method under `torch.no_grad()` unless you want gradients: while gradients are recorded, the images are watched
        for non-finite values, but the states are not.

        Args:
            lr: (B, 3, H, W).
            n: Number of samples of each image.
            temperature: Standard deviation of the latents.
            generator: A generator on the model's device; None is torch's default generator.
            on_nonfinite: What to do about a blown-up sample, whose state was not finite or beyond ±10⁴ at some step. "warn"
                gives a warning; "raise" raises `NonFiniteSamples`; "ignore" does nothing; "retry" draws the sample again, up to
                four times, each time at 0.8 times the temperature before, and warns about samples drawn again. All but "ignore"
                wait for the device once, after the last level.

        Raises:
            ValueError: n < 1, a negative temperature or another on_nonfinite; and as `encode` does for lr.
            TypeError: n or temperature is not a number.
        """
        return self._condition(lr).sample(n, temperature, generator, on_nonfinite=on_nonfinite)

    def check_invertibility(
        self, lr: Tensor, temperature: float = 0.9, generator: torch.Generator | None = None
    ) -> InvertibilityReport:
        """Decode one sample of each LR image step by step, and report how well every step can be inverted.

        For each step the report has the smallest scale, which is a divisor in decoding, the condition number of the 1×1
        convolution, the round-trip error and the largest state; for the images it has the round-trip error. Decoding compounds
        divisions by scales near zero, and the likelihood does not show it. `print(report)` prints a table; `report.worst` is
        the step with the smallest scale.

        The check is slow: it does not use the engine, and waits for the device at every step. It raises the same errors as
        `sample`.
        """
        check_temperature(temperature)
        return check_invertibility(self, self.padded(lr), temperature, generator)

    def latent_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """The shape (C, h, w) of each latent for an LR image of this size, in the order of `encode`."""
        return self.flow.latent_shapes(height, width)

    def padded(self, lr: Tensor) -> Tensor:
        """The LR images, checked, and padded to sides that the flow takes."""
        self._freezer.check(self)
        return self.inputs.lr(lr)

    def features(self, lr: Tensor, plain: bool | None = None) -> Condition:
        """The encoder's condition for padded LR images, unchecked; `plain`: by the reference (None: as `engine` says)."""
        if self.engine == "plain" if plain is None else plain:
            return self.encoder.condition(lr, None)
        options = self.served
        lr = laid_out(lr.to(options.network_dtype(lr.dtype)), options.memory_format)
        with without_autocast(lr.device.type):
            return self.encoder.condition(lr, options.method)

    def conditioned_levels(self, lr: Tensor, keeps: bool = False) -> Levels:
        """The levels for padded LR images, unchecked; `keeps`: their plans are cached for further calls."""
        return Levels(self.levels, self.flow, self.features(lr), self.served, keeps)

    def _condition(self, lr: Tensor, keeps: bool = False) -> ConditionedFlow:
        padded = self.padded(lr)
        with self._freezer.recording():
            levels = self.conditioned_levels(padded, keeps)
        watched = self.parameters if keeps else tuple
        return ConditionedFlow(levels, self.inputs, lr, watched, self._freezer.recording, self.advice)

    def advice(self, lr: Tensor) -> str:
        """An explanation why samples of LR images (B, 3, H, W) blew up, from weights and pixels, with advice."""
        broken = [name for name, weight in self.named_parameters() if not weight.isfinite().all()]
        if broken:
            return (
                f"{len(broken)} weights of the model are not finite, {broken[0]} first, so no temperature helps: load an "
                "earlier checkpoint."
            )
        return self.inputs.advice(lr)

    @property
    def frozen(self) -> bool:
        """True from `freeze_for_inference` to `unfreeze`."""
        return self._freezer.frozen

    def freeze_for_inference(self) -> NCSR:
        """Promise that the weights no longer change; return the model, in evaluation mode and without gradients.

        Actnorms, exp-scales and the inverses of the 1×1 convolutions are folded into constants now, and cached. Without this
        promise, a GPU folds in every pass, and a CPU compares a checksum of all weights. `encode`, `nll`, `decode` and `sample`
        of a frozen model record no gradients, not even of the images, and the stored gradients of parameters are dropped.
        `.to()`, `.double()` and the options of the engine still work, and fold again if necessary.

        Until `unfreeze`, whatever would change a weight raises FrozenError. `load_state_dict`, `load_published`, `initialize`,
        `train()` and `requires_grad_()` raise it before they do anything; after an in-place edit or the replacement of a
        parameter, the next pass raises it. Two kinds of change cannot be noticed: in-place edits of a parameter's `.data`, and
        the replay of a CUDA graph of training steps captured before. A copy or a pickle of a frozen model is not frozen, and
        its parameters require no gradients.

        Raises:
            ValueError: A 1×1 convolution has no inverse (for a model on the CPU); or the weights were made under
                `torch.inference_mode()`, where PyTorch does not count changes.
        """
        self._freezer.freeze(self, self._caches, self._visit)
        return self

    def unfreeze(self) -> NCSR:
        """Withdraw the promise and restore mode and gradients; nothing happens to a model that is not frozen."""
        self._freezer.thaw(self, self._caches)
        return self

    @property
    def folded_constants(self) -> list[dict]:
        """The constants of every level folded when the model was frozen; none for a model that is not frozen."""
        return [constants for cache in self._caches if (constants := cache.frozen_values) is not None]

    @property
    def _caches(self) -> list:
        return [level.cache for level in self.levels]

    def _visit(self) -> None:
        """Decode and encode the smallest possible image, so that everything the passes need is folded."""
        side = self.flow.lr_multiple
        lr = self.inputs.like.new_zeros(1, self.flow.channels, side, side)
        latents = [lr.new_zeros(1, *shape) for shape in self.latent_shapes(side, side)]
        self.encode(torch.zeros_like(self.decode(latents, lr)), lr)

    def train(self, mode: bool = True) -> NCSR:
        """Set training mode; raise FrozenError for a frozen model."""
        if mode:
            self._freezer.refuse("train()")
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> NCSR:
        """Set whether gradients of the weights are recorded; raise FrozenError for a frozen model."""
        if requires_grad:
            self._freezer.refuse("requires_grad_()")
        return super().requires_grad_(requires_grad)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Load a state dict as `torch.nn.Module` does; raise FrozenError for a frozen model."""
        self._freezer.refuse("load_state_dict()")
        return super().load_state_dict(*arguments, **options)

    def _apply(self, *arguments: Any, **options: Any) -> NCSR:  # what to(), cuda(), double() … do
        self._freezer.move(self, self._caches, lambda: super(NCSR, self)._apply(*arguments, **options), self._visit)
        return self

    def load_published(self, source: Mapping[str, Tensor] | str | os.PathLike) -> None:
        """Load the state dict of a published NCSR or SRFlow network, or the .pth or .safetensors file that holds one.

        If the tensors do not fit, nothing is changed. Tensors that no computation uses are stored for `published_state_dict`.
        The actnorms count as initialised if any of them is not zero, which is the published program's own rule.

        Raises:
            CheckpointError: Tensors are missing, unexpected or of the wrong shape; the message names them.
        """
        self._freezer.refuse("load_published()")
        published.load_network(self, read_state_dict(source))

    def published_state_dict(self) -> dict[str, Tensor]:
        """The weights under the published names and shapes; unused tensors are those last loaded, or zeros."""
        return published.network_state_dict(self)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        config: NCSRConfig | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> NCSR:
        """A model from a directory written by `save_pretrained`, a file, the package, or the Hugging Face Hub.

        Args:
            path: A directory; a published .pth or .safetensors file; a checkpoint of `ncsr-fast train`; the name of the shipped
                model, "ncsr-compact-x4"; or a repository "user/name" of the Hub. `ncsr_fast.hub.find_model` documents the order
                of the search.
            config: The configuration of a model in a file. None: the preset whose tensors have the file's names and shapes, or
                the configuration of the training run.
            revision: Revision of the Hub repository, as in `huggingface_hub.snapshot_download`.
            cache_dir: As in `huggingface_hub.snapshot_download`.
            token: As in `huggingface_hub.snapshot_download`.
            local_files_only: As in `huggingface_hub.snapshot_download`.
            options: Fields of `EngineOptions`.

        Raises:
            FileNotFoundError: There is no such model.
            CheckpointError: A file is corrupt, or of another model.
            ImportError: The path is a repository, and huggingface_hub is not installed.
        """
        path = find_model(path, revision, cache_dir, token, local_files_only)
        return models.load_model(lambda found: cls(found, **options), path, config)

    def save_pretrained(self, directory: str | os.PathLike) -> Path:
        """Write `config.json` and `model.safetensors` to `directory`, each atomically, and return it (`NCSRConfig` only)."""
        return files.save_directory(self, "ncsr", self._published_config("save_pretrained()").to_dict(), directory)

    def describe(self) -> str:
        """A description of the model in a few words, for messages."""
        if isinstance(self.config, NCSRConfig):
            return models.describe(self.config)
        return f"a flow, ×{self.flow.scale}, {len(self.levels)} levels"

    def _published_config(self, what: str) -> NCSRConfig:
        if not isinstance(self.config, NCSRConfig) or not isinstance(self.encoder, RRDB):
            raise ValueError(f"{what} is for the architectures of NCSRConfig; for this model use state_dict()")
        return self.config


def _rrdb(config: NCSRConfig | FlowConfig) -> RRDB:
    if not isinstance(config, NCSRConfig):
        raise ValueError("a model of a FlowConfig needs an encoder: NCSR(config, encoder)")
    encoder = RRDB(config.scale, config.channels, config.growth, config.blocks, config.stacked_blocks, long_skip="last_block")
    for module in encoder.head():  # the flow does not use them, so its loss gives them no gradient
        module.requires_grad_(False)
    return encoder


def _bits(encoded: Encoded, pixels: int) -> Tensor:
    """Negative log-likelihood (B,) in bits per pixel position, for images with this number of pixels."""
    return encoded.log_likelihood / (-math.log(2) * pixels)
