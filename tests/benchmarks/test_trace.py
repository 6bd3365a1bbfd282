"""What the package does on a GPU, on fake CUDA tensors: nothing waits, nothing mixes devices, and no pass grows unnoticed."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compat.standin import StandInNCSR
from installation import CHECKOUT
from operator_cases import marked
from torch import Tensor

import ncsr_fast
from ncsr_fast import NCSR, NCSRConfig, graphs, ops
from ncsr_fast.benchmarks import report

trace = pytest.importorskip("ncsr_fast.benchmarks.trace")
from ncsr_fast.benchmarks.fake_cuda import DEVICE, MixedDevices, fake_cuda  # noqa: E402
from ncsr_fast.benchmarks.launches import INSIDE, PARTS, REST, LaunchCounter  # noqa: E402
from ncsr_fast.benchmarks.waiting import HostWaits, NoWaiting  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # the first meta kernel that runs imports PyTorch's compiler, which takes seconds
    pytest.mark.skipif(not ops.backends("cuda")["triton"].available, reason="there are no Triton kernels to trace"),
]

STORED = CHECKOUT / "benchmarks" / "results" / "trace.json"
ROWS = json.loads(STORED.read_text())
COMMAND = f"python -m ncsr_fast.benchmarks.trace --json {STORED.relative_to(CHECKOUT)}"


@pytest.fixture
def gpu():
    with fake_cuda():
        yield


def random(*shape: int, **options) -> Tensor:
    return torch.rand(shape, device="cuda", **options)


def counted(run: Callable[[], object]) -> LaunchCounter:
    """What a pass launches; it neither waits nor touches a tensor of the CPU."""
    with LaunchCounter() as counter, NoWaiting():
        run()
    assert not counter.on_cpu
    return counter


# -- the passes ------------------------------------------------------------------------------------------------------


def test_a_row_of_every_task_and_precision_is_stored():
    stored = [(row["task"], row["precision"]) for row in ROWS]
    assert stored == [(task.name, precision) for task in trace.TASKS for precision in trace.PRECISIONS]


def test_the_rows_are_of_the_torch_that_ci_runs():
    """With another, whose operators may launch other kernels, they are compared with nothing."""
    (pinned,) = re.findall(r"^TORCH \?= torch==(\S+)$", (CHECKOUT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {row["torch"].partition("+")[0] for row in ROWS} == {pinned}, f"store them with torch {pinned}: {COMMAND}"


# of tf32 the launches of fp32, by the same code; of fp32 those of bf16 without its casts, seen in samples of small images
@marked(
    "exhaustive", lambda row: row["precision"] == "tf32" or (row["precision"] == "fp32" and row["task"] != "sample-40x40-n10")
)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['task']}-{row['precision']}")
def test_no_pass_asks_for_more_than_its_stored_row(row):
    """Full-size training steps and sampling, which neither wait nor mix devices."""
    if row["torch"].split(".")[:2] != torch.__version__.split(".")[:2]:
        pytest.skip(
            f"the rows are of torch {row['torch']}, whose operators may launch other kernels than {torch.__version__}'s"
        )
    task = next(task for task in trace.TASKS if task.name == row["task"])
    found = trace.row_of(task, row["precision"])
    for what in ("launches", "bytes"):
        rise = {name: count[what] - row["parts"].get(name, {what: 0})[what] for name, count in found["parts"].items()}
        assert found[what] <= row[what], f"{what} rose from {row[what]} to {found[what]}, by part: {rise}"
        assert found[what] == row[what], f"{what} fell from {row[what]} to {found[what]}: store it, {COMMAND}"


# A launch for each of the 345 convolutions of residual blocks and of the few others, in each direction; 2 for the weight
# gradients of a residual block, 3 for all weights and direction. Of hoisting 2 a level, or a branch without gradients.
@pytest.mark.parametrize(
    "name, launches, gigabytes",
    [
        ("sample-div2k-n10", {"encoder": 360, "hoist": 14}, {"encoder": 23.1, "hoist": 4.8}),
        pytest.param("train-b18", {"encoder": 755, "hoist": 38}, {"encoder": 10.5, "hoist": 4.0}, marks=pytest.mark.exhaustive),
    ],
)
def test_the_encoder_and_hoisting_in_triton(gpu, name, launches, gigabytes):
    model = trace.fake_model(NCSRConfig.preset("ncsr-x4"), "bf16")
    model.options = replace(model.options, backend="triton")
    parts = counted(next(task for task in trace.TASKS if task.name == name).prepare(model)).parts
    for part in launches:
        assert 0 < parts[part].launches <= launches[part], part
        assert 0 < parts[part].bytes <= 1e9 * gigabytes[part], part


def likelihood(model: NCSR) -> None:
    hr = random(2, 3, 16 * model.config.scale, 16 * model.config.scale)
    model.nll(hr, random(2, 3, 16, 16), torch.rand_like(hr)).mean().backward()
    assert all(parameter.grad.device == DEVICE for parameter in model.levels.parameters())


def sampling(model: NCSR) -> None:
    images, first_bad = graphs.Sampler(model.eval(), 3, graph=False)(random(2, 3, 15, 16))  # an odd height
    assert images.shape == (2, 3, 3, 15 * model.config.scale, 16 * model.config.scale)
    assert images.device == first_bad.device == DEVICE


def decoding(model: NCSR) -> None:
    latents = [random(2, *shape) for shape in model.latent_shapes(16, 16)]
    model.decode(latents, random(2, 3, 16, 16)).mean().backward()


# of ×8 a level more, by the same code; of decoding the forward pass is sampling's and the backward pass the likelihood's
@marked("exhaustive", lambda preset, run: run is decoding or (preset == "ncsr-x8" and run is not sampling))
@pytest.mark.parametrize("run", [likelihood, sampling, decoding])
@pytest.mark.parametrize("preset", ["ncsr-x4", "ncsr-x8"])
def test_presets_pass_without_waiting(gpu, preset, run):
    model = trace.fake_model(NCSRConfig.preset(preset))
    names = counted(lambda: run(model)).launches
    assert "flow_step_forward_kernel" in names and "inverse_logdet_kernel" in names


def test_the_drop_in_trains_without_waiting():
    flow = {
        "K": 16, "L": 3, "S": [0, 16, 16], "std_channels": 3, "coupling": "CondAffineSeparatedAndCond",
        "additionalFlowNoAffine": 2, "split": {"enable": True}, "fea_up0": True,
        "stackRRDB": {"blocks": [1, 8, 15, 22], "concat": True}, "CondAffineSeparatedAndCond": {"hidden_channels": 64},
    }  # fmt: skip
    network = {"which_model_G": "NCSRNet", "nf": 64, "gc": 32, "nb": 23, "flow": flow}
    net = StandInNCSR({"scale": 4, "datasets": {"train": {"quant": 32}}, "network_G": network})
    for module in net.modules():
        if hasattr(module, "inited"):
            module.inited = True
    handed_over = ncsr_fast.accelerate(net).handed_over
    with fake_cuda():
        net.to("cuda").train()
        gt, lr, std = random(18, 3, 160, 160), random(18, 3, 40, 40), random(18, 3, 160, 160)
        names = counted(lambda: net(gt=gt, lr=lr, reverse=False, std=std, add_gt_noise=False)[1].mean().backward()).launches
    assert not handed_over and "flow_step_backward_kernel" in names


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("channels", [12, 192])
def test_operators_do_not_wait(gpu, channels, inverse):
    x, h, raw = (random(2, factor * channels, 8, 8, requires_grad=True) for factor in (1, 1, 2))
    bias, logs, weight = (random(*(channels,) * axes, requires_grad=True) for axes in (1, 1, 2))
    calls = {
        "actnorm_invconv": lambda: ops.actnorm_invconv(x, bias, logs, weight, inverse=inverse),
        "affine_coupling": lambda: ops.affine_coupling(x, h, inverse=inverse),
        "affine_injector": lambda: ops.affine_injector(x, raw, inverse=inverse),
        "flow_step": lambda: ops.flow_step(x, h, bias, logs, weight, raw, inverse=inverse),
        "gaussian_split": lambda: ops.gaussian_split(x, h, inverse=inverse),
        "inverse_logdet": lambda: ops.inverse_logdet(weight[None]),
    }
    assert calls.keys() == {*ops.OPERATORS, "inverse_logdet"}
    for call in calls.values():
        y, logdet = counted_call(call)
        counted((y.sum() + logdet.sum()).backward)


def counted_call(call: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    results = []
    counted(lambda: results.extend(call()))
    assert [result.device for result in results] == [DEVICE, DEVICE]
    return results[0], results[1]


# -- what is refused -------------------------------------------------------------------------------------------------

WAITING = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.sum() > 0),
    "int": lambda x: int(x[0, 0]),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "write through a mask": lambda x: torch.ops.aten.index_put(x, [x > 0], x.new_zeros(())),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "copied to the CPU": lambda x: torch.zeros(3, 3).copy_(x),
    "copied from the CPU": lambda x: x.copy_(torch.zeros(3, 3)),
    "constant": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "moved": lambda x: torch.zeros(3, 3).to(x),
    "slogdet": lambda x: torch.linalg.slogdet(x),
    "det": lambda x: torch.linalg.det(x),
    "inverse": lambda x: torch.linalg.inv(x),
    "inv_ex": lambda x: torch.linalg.inv_ex(x),
    "lu_factor": lambda x: torch.linalg.lu_factor(x),
    "solve": lambda x: torch.linalg.solve(x, x),
    "cholesky": lambda x: torch.linalg.cholesky_ex(x),
    "eigh": lambda x: torch.linalg.eigh(x),
    "svd": lambda x: torch.linalg.svd(x),
    "lstsq": lambda x: torch.linalg.lstsq(x, x),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_refused(gpu, name):
    x = random(3, 3)
    with pytest.raises(HostWaits, match="makes the host wait|brings a tensor from the GPU"), NoWaiting():
        WAITING[name](x)


def test_what_does_not_wait_passes(gpu):
    x = random(3, 3)
    with NoWaiting():
        x.copy_(torch.zeros(3, 3), non_blocking=True)
        x.fill_(0.5).masked_fill_(x > 1, 2.0)
        x[torch.zeros(2, dtype=torch.int64, device="cuda")] += torch.tensor(1.0)  # a number, as a CUDA kernel takes it
        torch.where(x > 0, x, 0.0).double().to("cuda").repeat_interleave(2)
        torch.linalg.solve_triangular(x, x, upper=True)


def test_devices_are_not_mixed(gpu):
    x, y = random(2, 3), torch.ones(2, 3)
    for mixed in (lambda: x + y, lambda: torch.cat([x, y]), lambda: F.linear(x, y), lambda: y.add_(x)):
        with pytest.raises(MixedDevices, match="cuda .*cpu|cpu .*cuda"):
            mixed()


# -- what is pretended -----------------------------------------------------------------------------------------------


def test_fake_tensors_say_that_they_are_on_a_gpu(gpu):
    layer = torch.nn.Linear(3, 2).to("cuda")
    x = random(4, 3, requires_grad=True)
    assert x.device == DEVICE and x.is_cuda and not x.is_meta and x.get_device() == DEVICE.index and x.to("cuda:0") is x
    assert type(x) is Tensor and type(layer.weight) is torch.nn.Parameter
    layer(x).square().sum().backward()
    assert [tensor.grad.device for tensor in (x, layer.weight)] == [DEVICE, DEVICE]
    assert torch.ones(3).device.type == "cpu" and torch.ones(3).sum().item() == 3


def test_functions_written_by_hand_see_the_gpu_in_their_backward_pass(gpu):
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            seen.extend([dy.device, torch.empty(2, device=dy.device).device])
            return 2 * dy

    Double.apply(random(3, requires_grad=True)).sum().backward()
    assert seen == [DEVICE, DEVICE]
    x = random(3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="call Tensor.backward"):
        torch.autograd.grad(x.sum(), x)


def test_nothing_is_pretended_afterwards():
    from ncsr_fast.kernels import _common, flow_step

    def state() -> list:
        cuda = torch.cuda.get_device_properties, torch._C._group_tensors_by_device_and_dtype
        return [*cuda, torch.backends.cudnn.is_available(), flow_step.launch, torch.empty(1, device="meta").device.type]

    before = state()
    with fake_cuda():
        assert torch.backends.cudnn.is_available() and flow_step.launch is not before[3]
    assert state() == before and flow_step.launch is _common.launch


def test_without_triton_it_is_refused(monkeypatch):
    fake = sys.modules[fake_cuda.__wrapped__.__module__]
    missing = {"triton": ops.Backend("triton", False, "there is no Triton for this system")}
    monkeypatch.setattr(fake, "backends", lambda device: missing)
    with pytest.raises(ImportError, match="host code of the Triton kernels: there is no Triton"), fake_cuda():
        pass


# -- what is counted -------------------------------------------------------------------------------------------------


def test_convolutions_are_in_cudnns_layout_and_counted_with_what_surrounds_them(gpu):
    last = {"memory_format": torch.channels_last}
    x, weight, bias = random(2, 16, 8, 8).to(**last), random(32, 16, 3, 3, requires_grad=True), random(32, requires_grad=True)
    size = {"x": x.nbytes, "weight": weight.nbytes, "bias": bias.nbytes, "y": 4 * 2 * 32 * 8 * 8}
    with LaunchCounter() as counter:
        y = F.conv2d(x, weight, bias, padding=1)
    assert y.is_contiguous(**last)
    forward = counter.total
    assert forward.launches == 3  # of cuDNN, the weight's copy to channels-last, and the bias
    assert forward.bytes == sum(size.values()) + 2 * size["weight"] + 2 * size["y"]
    assert forward.flops == 2 * 2 * 8 * 8 * 32 * 16 * 9
    with LaunchCounter() as counter:
        y.backward(torch.empty_like(y))
    assert counter.launches["convolution_backward"] == 2  # both gradients: x needs none
    assert F.conv2d(x.double(), weight.double()).is_contiguous()  # float64 is not convolved channels-last
    assert F.conv2d(x.contiguous(), weight).is_contiguous()


def test_views_and_allocations_launch_nothing(gpu):
    x = random(4, 6, 8, 8)
    with LaunchCounter() as counter:
        x[:, 1:].transpose(1, 2).unsqueeze(0).expand(3, -1, -1, -1, -1).detach()
        x.to("cuda"), x.to(x.dtype), torch.empty(3, device="cuda"), torch.empty_like(x), x.split(2), x.new_zeros(0)
    assert counter.total.launches == 0 and not counter.on_cpu
    with LaunchCounter() as counter:
        torch.ones(3) + 1
    assert counter.total.launches == 0 and sum(counter.on_cpu.values()) == 2


def test_bytes_are_those_of_different_elements(gpu):
    x, y = random(4, 1), random(4, 100)
    with LaunchCounter() as counter:
        x.expand(4, 100) + y
    assert counter.total.bytes == 4 * (4 + 400 + 400)
    with LaunchCounter() as counter:
        y.copy_(x)  # which is not read before
    assert counter.total.bytes == 4 * (4 + 400)
    with LaunchCounter() as counter:
        torch.neg(y, out=y)
    assert counter.total.bytes == 4 * (400 + 400)


def test_many_tensors_take_few_launches(gpu):
    with LaunchCounter() as counter:
        torch._foreach_mul_([random(8) for _ in range(220)], 2.0)
    assert counter.launches["_foreach_mul_"] == 2  # 110 a kernel
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(50))).to("cuda")
    optimizer = graphs.adam(layers, 1e-3)
    step = graphs.TrainingStep(layers, optimizer, max_grad_norm=1.0, loss=lambda net, x: net(x).sum(), graph=False)
    step(random(2, 4))
    counter = counted(lambda: step(random(2, 4)))
    assert counter.launches["_fused_adam_"] == 3 and counter.parts["optimizer"].launches < 10  # 36 tensors a kernel
    assert counter.parts["clipping"].launches < 25
    lists, step = [[random(8, 8)] for _ in range(4)], random()
    options = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False}
    with LaunchCounter() as counter:
        torch._fused_adam_(*lists, [], [step], lr=1e-3, **options)
    assert counter.total.bytes == 4 * (7 * 64 + 1)  # all four and the number of the step read, all but the gradient written


def test_kernels_are_counted(gpu):
    x, h = random(2, 12, 8, 8), random(2, 12, 8, 8)
    with LaunchCounter() as counter:
        ops.affine_coupling(x, h)
    assert counter.launches["elementwise_forward_kernel"] == 1
    assert counter.total.kernels == sum(counter.launches[name] for name in counter.launches if name.endswith("_kernel"))


def test_parts_are_named_by_functions_that_exist():
    for module, functions in PARTS.items():
        found = importlib.import_module(module)
        methods = {name for each in vars(found).values() if isinstance(each, type) for name in vars(each)}
        assert {name for name in functions if name != "*"} <= {*vars(found), *methods}, module
    parts = {part for functions in PARTS.values() for part in functions.values()} | {REST}
    for part, module in INSIDE:
        assert part in parts and importlib.import_module(module)


def test_the_program_writes_rows_with_provenance_and_prints_a_table(monkeypatch, tmp_path, capsys):
    file = tmp_path / "rows.json"
    tasks = ["--tasks", "sample-40x40-n10", "--precisions", "bf16"]
    monkeypatch.setattr(sys, "argv", ["trace", "--json", str(file), *tasks])
    trace.main()
    (row,) = json.loads(file.read_text())
    assert row["command"] == f"python -m ncsr_fast.benchmarks.trace --json FILE {' '.join(tasks)}"
    assert (row["task"], row["precision"], row["torch"]) == ("sample-40x40-n10", "bf16", torch.__version__)
    assert {"operations", "kernels", "launches", "bytes", "flops", "ncsr_fast", "commit", "date"} <= row.keys()
    for what in ("operations", "kernels", "launches", "bytes", "flops"):
        assert row[what] == sum(count[what] for count in row["parts"].values()) > 0
    assert row["parts"].keys() >= {"encoder", "fold", "hoist", "injectors", "steps", "split", "watch", "draws"}
    table = capsys.readouterr().out
    assert table.strip() == report.trace_table([row])
    assert all(f"| {name} " in table for name in (*row["parts"], "all")) and str(row["launches"]) in table
