"""What the engine keeps for the backward pass, and what it computes how often."""

from __future__ import annotations

import pytest
import torch
from support import image, tiny_model

from ncsr_fast import NCSR
from ncsr_fast.encoder.blocks import DenseBlock
from ncsr_fast.engine.folding import fold_mixing
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.ops.conv3x3 import ConvolutionMethod
from ncsr_fast.ops.fold import folded


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
    minimum = sum(2 * pixels * (channels + 2 * channels + channels + 2 * 16) for channels, pixels in per_level)
    assert minimum <= recomputed <= minimum + 4 * 2 * folded  # folded weights, their factors and scales
    hidden = sum(2 * pixels * 16 * 3 for _, pixels in per_level)
    assert stored == recomputed + hidden


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


def test_convolutions_are_those_of_the_backend():
    """Triton's by its name alone; "native" takes what pays on a CPU, as "auto" does."""
    chosen = {backend: EngineOptions(backend=backend).method.backend for backend in ("auto", "native", "triton", "reference")}
    assert chosen == {"auto": "auto", "native": "auto", "triton": "triton", "reference": "reference"}
    assert EngineOptions(backend="triton", precision="tf32").method.tf32


def test_one_elimination_a_level(monkeypatch):
    """A level's determinants and inverses are found together: once a training step, and once for all samples."""
    calls = []

    def counted(bias: torch.Tensor, *rest: object):
        calls.append(bias.shape[0])
        return folded(bias, *rest)

    monkeypatch.setattr("ncsr_fast.engine.folding.folded", counted)
    model = tiny_model(steps=3, noise_steps=(0, 2, 3), transition_steps=2)
    lr, hr = image(1, 3, 4, 4), image(1, 3, 16, 16)
    model.nll(hr, lr).sum().backward()
    assert calls == [5, 5, 5]
    with torch.no_grad():
        model.sample(lr, n=4, on_nonfinite="ignore")
        assert calls == [5] * 6
        model.sample(lr, n=4, on_nonfinite="ignore")
    assert calls == [5] * 6


@pytest.mark.parametrize("inverse", [False, True])
def test_mixings_are_their_definition(inverse):
    """Composed transition steps, offsets and log-det; gradients included."""
    bias, logs, weight = (image(5, *shape, seed=i) - 0.5 for i, shape in enumerate(((6,), (6,), (6, 6))))
    leaves = [tensor.requires_grad_() for tensor in (bias, logs, weight + 2 * torch.eye(6))]
    bias, logs, weight = leaves
    x = image(6, 2, seed=9)

    def step(x: torch.Tensor, k: int) -> torch.Tensor:
        return weight[k] @ ((x + bias[k][:, None]) * logs[k].exp()[:, None])

    def step_back(y: torch.Tensor, k: int) -> torch.Tensor:
        return torch.linalg.solve(weight[k], y) * (-logs[k]).exp()[:, None] - bias[k][:, None]

    expected = []
    for first, last in ((0, 3), (3, 4), (4, 5)):  # two transition steps belong to the first conditional one
        y = x
        for k in reversed(range(first, last)) if inverse else range(first, last):
            y = step_back(y, k) if inverse else step(y, k)
        expected.append(y)
    logdet = (logs.sum() + torch.linalg.slogdet(weight)[1].sum()) * (-1 if inverse else 1)
    mixing = fold_mixing(*leaves, 2, inverse)
    found = [mix @ x + offset[:, None] for mix, offset in zip(mixing.mix, mixing.offset)]
    results = []
    for maps, total in ((found, mixing.logdet), (expected, logdet)):
        loss = torch.stack(maps).sin().sum() + total
        results.append([*(y.detach() for y in maps), total.detach(), *torch.autograd.grad(loss, leaves)])
    for value, right in zip(*results):
        assert torch.allclose(value, right, rtol=1e-10, atol=1e-10)
