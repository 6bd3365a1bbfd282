"""The convolution of enlarged features at the resolution they have, borders and gradients included."""

from __future__ import annotations

import installation
import pytest
import torch
import torch.nn.functional as F
from support import image

from ncsr_fast.engine.ablation import ablated
from ncsr_fast.engine.condition import Features
from ncsr_fast.engine.hoisting import algorithm, hoisted_convolution, hoisted_networks, prepared
from ncsr_fast.ops.backend import kernels
from ncsr_fast.ops.conv3x3 import ConvolutionMethod

METHOD = ConvolutionMethod()


def hoisted(own, stacked, weight, bias, method=METHOD, with_products=False):
    features = Features(own, stacked)
    chosen = algorithm(features, len(weight), weight.dtype, method)
    return hoisted_convolution(features, prepared(weight, own.shape[1], chosen, with_products), bias, method)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2), (5, 7)], ids=str)
@pytest.mark.parametrize("factor", [2, 4, 3, 8])
def test_grown_features(factor, size, layout):
    own = image(2, 3, size[0] * factor, size[1] * factor, seed=1).contiguous(memory_format=layout).requires_grad_()
    stacked = image(2, 5, *size, seed=2).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (image(*shape, seed=3).sub(0.5).requires_grad_() for shape in ((4, 8, 3, 3), (4,)))
    leaves = (own, stacked, weight, bias)
    joined = torch.cat([own, F.interpolate(stacked, scale_factor=factor, mode="nearest")], dim=1)
    expected = F.conv2d(joined, weight, bias, padding=1)
    cotangent = image(*expected.shape, seed=4)
    gradients = torch.autograd.grad(expected, leaves, cotangent)
    y = hoisted(own, stacked, weight, bias)
    assert y.is_contiguous(memory_format=layout)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(hoisted(own, stacked, weight, bias, with_products=True), y, rtol=0, atol=1e-14)
    for found, value in zip(torch.autograd.grad(y, leaves, cotangent), gradients):
        assert torch.allclose(found, value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("factor", [0.5, 1, 2, 4])
def test_wide_enough_for_winograd(factor):
    """Where a CPU has Winograd's kernel: levels at, above and below LR resolution, gradients included."""
    own = image(2, 32, int(6 * factor), int(10 * factor), seed=1).contiguous(memory_format=torch.channels_last)
    stacked = image(2, 13, 6, 10, seed=2).contiguous(memory_format=torch.channels_last)
    weight, bias = (image(*shape, seed=3).sub(0.5) for shape in ((40, 45, 3, 3), (40,)))
    leaves = [tensor.requires_grad_() for tensor in (own, stacked, weight, bias)]
    results = []
    for method, subpixel in ((METHOD, True), (ConvolutionMethod(backend="reference"), False)):
        with ablated(subpixel=subpixel):
            y = hoisted(*leaves, method)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    for found, expected in zip(*results):
        assert torch.allclose(found, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.skipif(("cpu", "triton") not in installation.cells(), reason="Triton's interpreter is not among the cells")
@pytest.mark.parametrize("factor", [0.5, pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_triton_by_name_convolves_both_parts_at_once(monkeypatch, factor):
    """At every resolution; TF32, which the interpreter has not, is passed on in both directions."""
    asked, triton = [], kernels("triton")
    for name in ("hoisted_forward", "hoisted_backward"):
        function = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *a, call=function, **named: asked.append(named["tf32"]) or call(*a, **named))
    own, stacked = image(1, 3, int(2 * factor), int(4 * factor), seed=1).float(), image(1, 5, 2, 4, seed=1).float()
    weight, bias = image(4, 8, 3, 3, seed=3).float() - 0.5, image(4, seed=4).float()
    leaves = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in (own, stacked)]
    leaves += [weight.requires_grad_(), bias.requires_grad_()]
    results, triton_method = [], ConvolutionMethod(tf32=True, backend="triton")
    for method in (triton_method, ConvolutionMethod(backend="reference")):
        y = hoisted(*leaves, method)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
        assert asked == [True] * 2
    for found, expected in zip(*results):  # of sums of up to 72 products in float32, rounded by 4 eps, and their sines
        assert torch.allclose(found, expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))
    with torch.no_grad():
        weight = prepared(leaves[2], 3, "whole", True)
        networks = hoisted_networks(Features(*leaves[:2]), weight, leaves[3], 2, triton_method)
    assert torch.equal(torch.cat(networks, dim=1), results[0][0])
    assert all(network.is_contiguous(memory_format=torch.channels_last) for network in networks)


def test_float32_is_as_exact_as_the_convolution_it_replaces():
    """The differences and sums of the decomposition cost no more than a few roundings."""
    own, stacked = image(1, 16, 24, 24, seed=1), image(1, 64, 12, 12, seed=2)
    weight, bias = image(8, 80, 3, 3, seed=3) - 0.5, image(8, seed=4)
    joined = torch.cat([own, F.interpolate(stacked, scale_factor=2, mode="nearest")], dim=1)
    exact = F.conv2d(joined, weight, bias, padding=1)
    direct = F.conv2d(joined.float(), weight.float(), bias.float(), padding=1)
    found = hoisted(own.float(), stacked.float(), weight.float(), bias.float())
    assert (found - exact).abs().max() < 4 * (direct - exact).abs().max()
