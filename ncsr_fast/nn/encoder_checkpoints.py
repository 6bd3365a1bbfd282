"""RRDB networks in files: those of the published programs, and our directories."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ncsr_fast import files
from ncsr_fast.hub import find_model
from ncsr_fast.nn.encoder_names import GeneratorState, configuration_of, encoder_layout, published_layout, read_generator

if TYPE_CHECKING:
    from ncsr_fast.nn.encoder import RRDB


class EncoderCheckpoints:
    """The part of `RRDB` that reads and writes weights."""

    def load_published(self: RRDB, source: Mapping[str, Tensor] | str | os.PathLike) -> None:
        """Load the weights of a published generator, or of the encoder in a flow checkpoint, into this network.

        Strict, and nothing is changed when they do not fit. The long skip stays that of this network: a flow's encoder may
        start from an ESRGAN generator, to be trained on.

        Args:
            source: A state dict or a file, in the names of SRFlow, BasicSR or ESRGAN (new and old).

        Raises:
            CheckpointError: Tensors are missing, unexpected or of the wrong shape; or they are those of a flow's encoder,
                whose long skip starts at the last block, and that of this network does not.
        """
        found = read_generator(source)
        if found.of_flow and self.long_skip != "last_block":
            raise files.CheckpointError(
                "the checkpoint is a flow's, and the long skip of its encoder starts at the last block, not at the first "
                "convolution as in this network: build it with long_skip='last_block'"
            )
        _load(self, found)

    def published_state_dict(self: RRDB) -> dict[str, Tensor]:
        """The weights under the names that the published programs read.

        The names are SRFlow's, which NCSR and ESRGAN's new architecture share; of ESRGAN+ its own, of generators that begin
        with a pixel unshuffle BasicSR's.
        """
        return {name: tensor.clone() for name, tensor in published_layout(self)}

    @classmethod
    def from_pretrained(
        cls: type[RRDB],
        path: str | os.PathLike,
        *,
        long_skip: str | None = None,
        unshuffle: int | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> RRDB:
        """A generator from a directory written by `save_pretrained`, a published file, or the Hugging Face Hub.

        Published are ESRGAN (new and old architecture), BasicSR and Real-ESRGAN with their ×2 and ×1 forms, ESRGAN+, and the
        encoders of SRFlow and NCSR. Sizes are read off the shapes.

        Args:
            path: A directory; a .pth or .safetensors file; or a repository "user/name" of the Hub.
            long_skip: Where the long skip starts, which no file of weights says: "conv_first", the default, for all
                generators; "last_block" for the RRDB files of SRFlow and NCSR. A flow checkpoint is read as the latter, and
                a directory as its config.json has it: as "last_block" where an earlier version wrote it without.
            unshuffle: Pixel unshuffle before the first convolution of a file, which no file says. None: the shapes decide. It
                is 2, 4, … where the first convolution reads 4, 16, … times the channels that the last one makes, as in
                BasicSR's ×2 and ×1 generators, and the network doubles often enough; otherwise 1.
            revision: As cache_dir, token and local_files_only for the Hub, see `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: long_skip or unshuffle is not what the flow or directory has.
            FileNotFoundError, CheckpointError, ImportError: As for `NCSR.from_pretrained`.
        """
        path = find_model(path, revision, cache_dir, token, local_files_only)
        if not path.is_dir():
            return cls.from_state_dict(read_generator(path), long_skip, unshuffle)
        unrecorded = {"long_skip": long_skip or "last_block"}  # by versions that had no other
        network = files.load_directory(path, "rrdb", lambda values: cls(**{**unrecorded, **values}))
        for name, asked in (("long_skip", long_skip), ("unshuffle", unshuffle)):
            if asked not in (None, getattr(network, name)):
                raise ValueError(f"{name}={asked!r}: {str(path)!r} holds a network with {name}={getattr(network, name)!r}")
        return network

    @classmethod
    def from_state_dict(
        cls: type[RRDB], state: GeneratorState, long_skip: str | None = None, unshuffle: int | None = None
    ) -> RRDB:
        """A generator of the size that the shapes tell; long_skip and unshuffle as for `from_pretrained`."""
        if state.of_flow:
            if long_skip not in (None, "last_block"):
                raise ValueError(f"long_skip={long_skip!r}: the file is a flow's, and its encoder's is 'last_block'")
            long_skip = "last_block"
        network = cls(**configuration_of(state.tensors, unshuffle), long_skip=long_skip or "conv_first")
        files.adopt_dtype(network, state.tensors)
        _load(network, state)
        return network

    def save_pretrained(self: RRDB, directory: str | os.PathLike) -> Path:
        """Write `config.json` and `model.safetensors` to `directory`, each atomically; return it."""
        return files.save_directory(self, "rrdb", self.configuration(), directory)


def _load(network: RRDB, state: GeneratorState) -> None:
    """Copy a state dict into `network`; strict, and nothing is changed when it does not fit."""
    entries = dict(encoder_layout(network))
    expected = {name: tuple(tensor.shape) for name, tensor in entries.items()}
    files.compare(expected, state.tensors, f"this encoder ({network.describe()})")
    for name, tensor in entries.items():
        tensor.copy_(state.tensors[name])
