"""The NCSR model (Kim & Son 2021): a flow on the HR image, conditioned on the LR image and on the added noise."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncsr_fast import files
from ncsr_fast.autocast import without_autocast
from ncsr_fast.checkpoints import models, published
from ncsr_fast.checkpoints.state_dicts import read_state_dict
from ncsr_fast.checks import check_temperature, check_tile
from ncsr_fast.config import FlowConfig, NCSRConfig
from ncsr_fast.encoder.low_light import LowLightEncoder
from ncsr_fast.encoder.published import published_encoder
from ncsr_fast.encoder.rrdb import RRDB
from ncsr_fast.encoder.tiled import condition
from ncsr_fast.engine.condition import Condition
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.flow.conditioned import Encoded, Levels
from ncsr_fast.flow.inputs import Inputs
from ncsr_fast.flow.level import FlowLevel
from ncsr_fast.flow.samples import ConditionedFlow
from ncsr_fast.freezing import Freezable
from ncsr_fast.hub import find_model, push_to_hub
from ncsr_fast.invertibility import InvertibilityReport, check_invertibility
from ncsr_fast.layout import laid_out


def _option(name: str, meaning: str) -> property:
    """A property of a model that reads and writes one field of its `options`."""

    def write(model: NCSR, value: Any) -> None:
        model.options = replace(model.options, **{name: value})

    return property(lambda model: getattr(model.options, name), write, doc=meaning)


class NCSR(Freezable):
    """NCSR or SRFlow super-resolution flow, or another flow of the family.

    `lr` is (B, 3, H, W) and `hr` (B, 3, sH, sW), float RGB in [0, 1], of the model's dtype and device. Both are what the flow
    sees: the caller adds the noise (`ncsr_fast.data.perturb`). `noise` conditions the flow on what was added: (B, 3, sH, sW)
    when the configuration's `noise_channels` is 3, (B, 1, 1, 1) when it is 1, and None means zero.

    Any LR size from 1×1 is accepted. Odd sizes are padded (reflection; replication of a single row or column) to even ones,
    images returned are cropped back, and latents and likelihoods are those of the padded image. The `lr` of LLFlow has six
    channels (`ncsr_fast.data.low_light_input`), images of CTFlow have one; both are padded to multiples of 8.

    Everything is differentiable with respect to images and parameters. `model(hr, lr, noise)` is `model.nll(hr, lr, noise)`.
    Under `torch.autocast` the networks have the precision it asks for, as with `precision`, and the state stays float32.

    Args:
        config: An architecture of the published models (`NCSRConfig`), or a `FlowConfig`, which needs an encoder.
        encoder: A module that makes the condition of LR images (`ncsr_fast.engine.condition.Encoder`); None: the config's.
        options: Of `EngineOptions`: `engine`, `precision`, `checkpoint` … They may be given to `from_pretrained` too, and
            changed at any time: `model.precision = "bf16"`, `model.options = replace(model.options, …)`.
    """

    def __init__(self, config: NCSRConfig | FlowConfig, encoder: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config
        self.flow = config.flow if isinstance(config, NCSRConfig) else config
        self.options = EngineOptions(**options)
        self.encoder = published_encoder(config) if encoder is None else encoder
        flow = self.flow
        self.levels = nn.ModuleList(
            FlowLevel(level, channels, flow.hidden_channels, flow.noise_channels, flow.eps)
            for level, channels in zip(flow.levels, flow.level_channels())
        )
        # persistent, so that a reloaded model is not initialised again from whatever batch comes first
        self.register_buffer("actnorm_initialized", torch.tensor(False))
        self.unused_published: dict[str, Tensor] = {}  # tensors of a published file that no computation reads

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

    def condition(self, lr: Tensor, *, tile: int | str | None = None) -> ConditionedFlow:
        """The flow conditioned on LR images: the encoder, and all else that they alone decide, is computed once.

        For many images of the same LR image: samples, or the steps of a solver of an inverse problem. Calls of the result
        differentiate what autograd records when this is called: under `torch.no_grad()`, later gradients are those of latents
        and HR images alone, and cost the flow alone.

        Args:
            lr: (B, 3, H, W).
            tile: For samples in tiles, as for `sample`: the encoder is evaluated in tiles too, in less memory.

        Returns:
            A `ConditionedFlow`, with `sample`, `encode`, `decode` and `log_prob`; it holds for the weights as they are, and
            its calls raise RuntimeError after they have changed. (The engine "plain" records weights in every call.)

        Raises:
            ValueError, TypeError: As `encode` does for lr.

        Example:
            >>> with torch.no_grad():
            ...     flow = model.condition(lr)
            >>> latents = [torch.zeros(1, *shape, requires_grad=True) for shape in model.latent_shapes(*lr.shape[2:])]
            >>> loss = (flow.decode(latents) - target).square().mean()
        """
        return self._condition(lr, keeps=True, tile=tile)

    def encode(
        self,
        hr: Tensor,
        lr: Tensor,
        noise: Tensor | None = None,
        *,
        prior: str | Tensor = "condition",
        tile: int | str | None = None,
    ) -> Encoded:
        """Latents and log-likelihood of `hr` given `lr`.

        Args:
            hr: (B, 3, sH, sW).
            lr: (B, 3, H, W).
            noise: Condition, or None for zero.
            prior: Where the mean of the top latent comes from, where there is one: "condition", from `lr`; "reference", from
                `hr`, as LLFlow is trained in a part of the batches; or of each image one of them, (B,) bool, True for `hr`.
            tile: None: whole. A number of LR pixels, or "auto": in tiles as for `sample`, equal to rounding, in less memory;
                without gradients alone ("auto" encodes whole where they are recorded).

        Returns:
            `.latents`, a tuple: those of the splits in encoding order, then the top one, all standard normal under the model
            (but for a mean of the top one where the flow has such a prior, `.prior_mean`); `.log_likelihood` (B,) in nats,
            `log p(hr | lr) = Σ log|det| + Σ log N(latent; 0, 1)`.

        Raises:
            ValueError, TypeError: Shape, HR/LR sizes that do not fit the scale, dtype, device, and (CPU tensors) NaN or
                infinite values; the message names the argument.
        """
        return self._condition(lr, tile=tile).encode(hr, noise, prior=prior, tile=tile)

    def forward(self, hr: Tensor, lr: Tensor, noise: Tensor | None = None, *, prior: str | Tensor = "condition") -> Tensor:
        """Return `nll(hr, lr, noise)`, so that training, module wrappers, hooks and `torch.compile` can call the model."""
        return self.nll(hr, lr, noise, prior=prior)

    def nll(
        self,
        hr: Tensor,
        lr: Tensor,
        noise: Tensor | None = None,
        *,
        prior: str | Tensor = "condition",
        tile: int | str | None = None,
    ) -> Tensor:
        """Negative log-likelihood (B,) in bits per HR pixel *position*, `-log p / (ln 2 · H · W)`.

        As in the published programs it is not divided by the channels. H and W are the padded size; `prior` and `tile` are
        those of `encode`.
        """
        return _bits(self.encode(hr, lr, noise, prior=prior, tile=tile), self.inputs.padded_pixels(lr))

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

    def decode(
        self, latents: Sequence[Tensor], lr: Tensor, noise: Tensor | None = None, *, tile: int | str | None = None
    ) -> Tensor:
        """The inverse of `encode`: latents → hr (B, 3, sH, sW), not clipped to [0, 1]; `tile` as for `sample`.

        Raises:
            ValueError: The latents are not those of an image of this size (`latent_shapes`).
        """
        return self._condition(lr, tile=tile).decode(latents, noise, tile=tile)

    def sample(
        self,
        lr: Tensor,
        n: int = 10,
        temperature: Any = 0.9,
        generator: torch.Generator | None = None,
        tile: int | str | None = "auto",
        *,
        latents: Sequence[Tensor] | None = None,
        on_nonfinite: str = "warn",
        project: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """n super-resolved images (B, n, 3, sH, sW) of each LR image, clipped to [0, 1].

        Latents are drawn from N(0, temperature²) on the model's device: the same seed gives the same images, and the first m
        samples do not depend on n. The noise condition is zero, as in the published programs. The encoder, and all else that
        the LR image alone decides, is computed once for all samples.

        The inverse of a flow can explode. A pixel that overflowed is NaN, never silently black or white.

        Call it under `torch.no_grad()` unless gradients are wanted: it is as differentiable as the rest, but then only the
        images are watched, not the states.

        Args:
            lr: (B, 3, H, W).
            n: Samples of each image.
            temperature: Standard deviation of the latents: a number; one of each latent or each level, the coarsest last; or a
                map (B or 1, 1, H, W) of LR pixels.
            generator: Of the model's device; None is torch's default one.
            tile: A large image is decoded in tiles of so many LR pixels a side, with the halo that makes the result equal to
                rounding, in less memory; "auto": in tiles as large as the free memory allows, and of one where all fits, or
                gradients are recorded; None: whole. "auto" and numbers go on with smaller tiles when memory runs out.
            latents: The images' latents (B, n, …), in the order of `encode`, in place of drawn ones: those of a learned prior.
            on_nonfinite: What to do about a sample whose state, at any step, was not finite or beyond ±10⁴: "warn"; "raise"
                `NonFiniteSamples`; "ignore"; or "retry": draw it again, up to four times, at 0.8 times the temperature before,
                and warn of those drawn again. All but "ignore" wait for the device once, after the last level.
            project: True: samples are put onto the LR image, by the smallest change after which their bicubic reduction (as
                MATLAB has it) is that image: `ncsr_fast.consistency`.
            progress: Is told, after every tile, which part (0, 1] is done.

        Raises:
            ValueError: n < 1, a negative temperature, a map or latents of another shape, another tile or on_nonfinite; and as
                `encode` does for lr.
            TypeError: What is no number.
        """
        flow = self._condition(lr, tile=tile)
        options = {"tile": tile, "on_nonfinite": on_nonfinite, "project": project, "progress": progress}
        return flow.sample(n, temperature, generator, latents, **options)

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

    def features(self, lr: Tensor, plain: bool | None = None, tile: int | str | None = None) -> Condition:
        """The encoder's condition for padded LR images, unchecked; `plain`: by the reference (None: as `engine` says)."""
        if self.engine == "plain" if plain is None else plain:
            return condition(self.encoder, lr, None, tile)
        options = self.served
        lr = laid_out(lr.to(options.network_dtype(lr.dtype)), options.memory_format)
        with without_autocast(lr.device.type):
            found = condition(self.encoder, lr, options.method, tile)
        return found.with_mean_in(self.inputs.like.dtype)

    def conditioned_levels(self, lr: Tensor, keeps: bool = False, tile: int | str | None = None) -> Levels:
        """The levels for padded LR images, unchecked; `keeps`: their plans are cached for further calls."""
        return Levels(self.levels, self.flow, self.features(lr, tile=tile), self.served, keeps)

    def _condition(self, lr: Tensor, keeps: bool = False, tile: int | str | None = None) -> ConditionedFlow:
        check_tile(tile)
        padded = self.padded(lr)
        with self._freezer.recording():
            levels = self.conditioned_levels(padded, keeps, tile)
        watched = self.parameters if keeps else tuple
        reference = getattr(self.encoder, "reference_prior_mean", None)
        return ConditionedFlow(levels, self.inputs, lr, watched, self._freezer.recording, self.advice, reference)

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
    def _caches(self) -> list:
        return [level.cache for level in self.levels]

    def _visit(self) -> None:
        """Decode and encode the smallest possible image, so that everything the passes need is folded."""
        side = self.flow.lr_multiple
        lr = self.inputs.like.new_zeros(1, self.flow.lr_channels, side, side)
        latents = [lr.new_zeros(1, *shape) for shape in self.latent_shapes(side, side)]
        self.encode(torch.zeros_like(self.decode(latents, lr)), lr)

    def load_published(self, source: Mapping[str, Tensor] | str | os.PathLike) -> None:
        """Load the state dict of a published network, or the .pth or .safetensors file that holds one.

        Nothing is changed when it does not fit. Tensors no computation uses are stored for `published_state_dict`. The actnorms
        count as initialised when any of them is not zero, the published program's own rule.

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
            path: A directory; a published .pth or .safetensors, or a checkpoint of `ncsr-fast train`; the name of a shipped
                model, "ncsr-compact-x4" or "llflow-compact"; or a repository "user/name" of the Hub: see
                `ncsr_fast.hub.find_model`.
            config: Of a file; None finds the preset whose tensors have the file's names and shapes, or a training run's own.
            revision: Of the Hub, as `huggingface_hub.snapshot_download` has it; so are the following.
            cache_dir: Likewise.
            token: Likewise.
            local_files_only: Likewise.
            options: Of `EngineOptions`.

        Raises:
            FileNotFoundError: There is no such model.
            CheckpointError: A file is corrupt or of another model.
            ImportError: A repository is wanted, without huggingface_hub.
        """
        path = find_model(path, revision, cache_dir, token, local_files_only)
        return models.load_model(lambda found: cls(found, **options), path, config)

    def save_pretrained(self, directory: str | os.PathLike) -> Path:
        """Write `config.json` and `model.safetensors` to `directory`, each atomically, and return it (`NCSRConfig` only)."""
        return files.save_directory(self, "ncsr", self._published_config("save_pretrained()").to_dict(), directory)

    def push_to_hub(self, repository: str, *, data: str, terms: str, **options: Any) -> str:
        """Upload the model and a generated card to the Hugging Face Hub; see `ncsr_fast.hub.push_to_hub`."""
        return push_to_hub(self, repository, data=data, terms=terms, **options)

    def describe(self) -> str:
        """A description of the model in a few words, for messages."""
        if isinstance(self.config, NCSRConfig):
            return models.describe(self.config)
        return f"a flow, ×{self.flow.scale}, {len(self.levels)} levels"

    def _published_config(self, what: str) -> NCSRConfig:
        if not isinstance(self.config, NCSRConfig) or not isinstance(self.encoder, (RRDB, LowLightEncoder)):
            raise ValueError(f"{what} is for the architectures of NCSRConfig; for this model use state_dict()")
        return self.config


def _bits(encoded: Encoded, pixels: int) -> Tensor:
    """Negative log-likelihood (B,) in bits per pixel position, for images with this number of pixels."""
    return encoded.log_likelihood / (-math.log(2) * pixels)
