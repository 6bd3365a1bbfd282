"""Scalars and images of a run for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class Board:
    """Writer of a folder for `tensorboard --logdir`, with a subfolder for each stage, because stages count their own steps.

    The first value of a stage marks the step at which its curves continue. Values that a stopped run wrote for this step and
    later steps are hidden, because the resumed run writes them again.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"tensorboard=true needs TensorBoard ({error}): pip install 'ncsr_fast[train]'") from error
        self._make, self.folder = SummaryWriter, Path(folder)
        self._writers: dict[str, Any] = {}

    def scalars(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Write points of the curves `stage`/name."""
        for name, value in values.items():
            self._writer(stage, step).add_scalar(f"{stage}/{name}", value, step)

    def image(self, step: int, stage: str, name: str, image: Tensor) -> None:
        """Write an image (3, H, W) in [0, 1]; NaN is black."""
        self._writer(stage, step).add_image(f"{stage}/{name}", image.detach().float().nan_to_num(0).clamp(0, 1).cpu(), step)

    def close(self) -> None:
        """Write everything that is still buffered."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, stage: str, step: int) -> Any:
        if stage not in self._writers:
            self._writers[stage] = self._make(self.folder / stage, purge_step=step, flush_secs=10)
        return self._writers[stage]
