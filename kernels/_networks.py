"""Functions that the kernels of several networks at once share: images and weights that differ in where they begin alone."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import image
from ncsr_fast.layout import empty_channels_last


@triton.jit
def one_of(pointers, i):
    """Pointer i of several."""
    p = pointers[0]
    for j in tl.static_range(1, len(pointers)):
        p = tl.where(i == j, pointers[j], p)
    return p


def images(name: str, xs: Sequence[Tensor | None], written: bool = False) -> dict[str, tuple | None]:
    """The form in which a kernel takes images of one shape and dtype: their pointers, and the strides that all of them have.

    Those that lie differently are copied, but not if they are `written`. Both are None where the first image is.

    Raises:
        ValueError: They are written and lie differently.
    """
    given = [x for x in xs if x is not None]
    if not given:
        return {f"p_{name}": None, f"{name}_strides": None}
    if any(x.stride() != given[0].stride() for x in given):
        if written:
            raise ValueError(f"{name}: the tensors written must all have the same strides")
        given = [empty_channels_last(x.shape, x).copy_(x) for x in given]
    forms = [image(x) for x in given]
    return {f"p_{name}": tuple(form[0] for form in forms), f"{name}_strides": forms[0][1:]}
