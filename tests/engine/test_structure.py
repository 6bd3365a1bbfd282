"""What the engine keeps for the backward pass, and what it computes how often."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from support import Watch, image, tiny_model

from ncsr_fast import NCSR
from ncsr_fast.engine.convolution import ConvolutionMethod
from ncsr_fast.engine.folding import fold_mixing
from ncsr_fast.nn.encoder import DenseBlock


def kept_for_backward(function) -> dict[int, int]:
    """Elements of every memory that autograd keeps during a call."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results.append(function())
    return kept


results: list[torch.Tensor] = []  # alive, so that no memory is used twice


def activations(model: NCSR, checkpoint: bool) -> int:
    model.checkpoint = checkpoint
    lr, hr = image(1, 3, 8, 8), image(1, 3, 32, 32)
    kept = kept_for_backward(lambda: model.nll(hr, lr))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(elements for pointer, elements in kept.items() if pointer not in weights)


def test_activations_of_the_small_networks_are_not_kept():
    """For each step: its state, what its injector said, and its share of the pre-activations; not the hidden layers."""
    sizes = {"hidden_channels": 16, "transition_steps": 0}
    two, four = (tiny_model(steps=steps, noise_steps=(0, 0, 0), **sizes) for steps in (2, 4))
    stored = activations(four, False) - activations(two, False)
    recomputed = activations(four, True) - activations(two, True)
    per_level = [(channels, 16 * 16 >> 2 * index) for index, channels in enumerate(two.config.level_channels())]
    folded = sum(sum(p[0].numel() for p in level.parameters() if len(p) == 2) for level in two.levels)
    minimum = sum(2 * pixels * (channels + 2 * channels + 2 * 16) for channels, pixels in per_level)
    assert minimum <= recomputed <= minimum + 4 * 2 * folded  # folded weights, their factors and scales
    hidden = sum(2 * pixels * 16 * 3 for _, pixels in per_level)
    assert stored > recomputed + hidden


def test_the_encoder_keeps_what_it_needs():
    """Kept for the backward pass of a dense block: its input, parameters, and each of its features once."""
    block = DenseBlock(8, 4).double()
    x = image(1, 8, 6, 6).requires_grad_()
    kept = kept_for_backward(lambda: block(x))
    known = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), x)}
    assert sum(elements for pointer, elements in kept.items() if pointer not in known) == (8 + 4 * 4) * 36


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("channels, growth", [(3, 5), (32, 32)])
def test_a_dense_block_is_its_definition(channels, growth, layout):
    block = DenseBlock(channels, growth).double()
    x = image(2, channels, 5, 6).contiguous(memory_format=layout).requires_grad_()
    results_of = []
    for method in (ConvolutionMethod(), None):
        y = block(x, method)
        results_of.append([y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])])
    for found, expected in zip(*results_of):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


class Count(Watch):
    """The number of calls of each operator."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        super().__init__(lambda name, _: self.calls.update([name.split("::")[1]]))


def test_one_determinant_and_one_inverse_a_level(monkeypatch):
    """Where it is PyTorch that finds them, as on a GPU."""
    monkeypatch.setattr("ncsr_fast.engine.folding.reading_is_free", lambda tensor: False)
    model = tiny_model(steps=3, noise_steps=(0, 2, 3), transition_steps=2)
    lr, hr = image(1, 3, 4, 4), image(1, 3, 16, 16)
    with Count() as forward:
        model.nll(hr, lr)
    assert forward.calls["_linalg_slogdet"] == 3 and forward.calls["linalg_inv_ex"] == 0
    with torch.no_grad():
        with Count() as first:
            model.sample(lr, n=4, on_nonfinite="ignore")
        assert first.calls["linalg_inv_ex"] == first.calls["_linalg_slogdet"] == 3
        with Count() as second:
            model.sample(lr, n=4, on_nonfinite="ignore")
    assert second.calls["linalg_inv_ex"] == second.calls["_linalg_slogdet"] == 0


@pytest.mark.parametrize("inverse", [False, True])
def test_determinants_and_inverses_of_two_kinds_agree(inverse, monkeypatch):
    """Our elimination on the CPU, and PyTorch's; gradients included."""
    bias, logs, weight = (image(5, *shape, seed=i) - 0.5 for i, shape in enumerate(((6,), (6,), (6, 6))))
    leaves = [tensor.requires_grad_() for tensor in (bias, logs, weight + 2 * torch.eye(6))]
    found = []
    for free in (True, False):
        monkeypatch.setattr("ncsr_fast.engine.folding.reading_is_free", lambda tensor, free=free: free)
        mixing = fold_mixing(*leaves, 2, inverse)
        loss = mixing.mix.sin().sum() + mixing.offset.sin().sum() + mixing.logdet
        found.append([*(part.detach() for part in mixing), *torch.autograd.grad(loss, leaves)])
    for own, torchs in zip(*found):
        assert torch.allclose(own, torchs, rtol=1e-10, atol=1e-10)


def test_determinants_after_a_change_of_the_number_of_threads():
    """With MKL, elimination of 192 channels was wrong from then on."""
    before = torch.get_num_threads()
    weight = torch.stack([torch.eye(192, dtype=torch.float64) + 0.02 * (image(192, 192, seed=i) - 0.5) for i in range(3)])
    expected = sum(np.linalg.slogdet(matrix.numpy())[1] for matrix in weight)
    zeros = torch.zeros(3, 192, dtype=torch.float64)
    try:
        for threads in (1, 2, before):
            torch.set_num_threads(threads)
            mixing = fold_mixing(zeros, zeros, weight, 0, False)
            assert abs(float(mixing.logdet) - expected) < 1e-9
            inverses = fold_mixing(zeros, zeros, weight, 0, True).mix
            assert torch.allclose(inverses @ weight, torch.eye(192, dtype=torch.float64).expand(3, -1, -1), atol=1e-10)
    finally:
        torch.set_num_threads(before)
