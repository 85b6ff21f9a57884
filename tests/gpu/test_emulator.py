"""The emulated device itself: equal gradients, CUDA's branches of torch, and an error for each misuse."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.emulated_cuda import (
    CudaTensor,
    Device,
    HostWaits,
    MixedDevices,
    emulate_cuda,
    is_supported,
)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: float, x: Tensor, y: Tensor) -> Tensor:
        ctx.factor = factor
        return factor * x + y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.factor * gradient, gradient


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    return nn.Sequential(*layers)


def loss(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a loss, and a tensor that it is computed from."""
    hidden = net[:3](images)  # type: ignore[index]
    logits = net[3:](hidden)  # type: ignore[index]
    both = Doubled.apply(2.0, logits, hidden.mean((1, 2, 3), keepdim=True)[:, :, 0, 0])
    return F.cross_entropy(both, labels) + hidden.square().mean(), hidden


def test_gradients_and_updates_equal_the_cpus(gpu: Device) -> None:
    images, labels = torch.randn(4, 3, 4, 4), torch.arange(4)
    results = []
    for device in ("cpu", "cuda"):
        net = network()
        identities = [id(p) for p in net.parameters()]
        net = copy.deepcopy(net.to(device, memory_format=torch.channels_last))
        assert len(identities) == 6 and all(p.device.type == device for p in net.parameters())
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        value, hidden = loss(net, images.to(device), labels.to(device))
        unused = torch.zeros(2, device=device, requires_grad=True)
        pair = torch.autograd.grad(value, [hidden, unused], retain_graph=True, allow_unused=True)
        assert pair[1] is None
        value.backward()
        loss(net, images.to(device), labels.to(device))[0].backward()  # gradients add up
        optimizer.step()
        tensors = [value, pair[0], *(p.grad for p in net.parameters()), *net.state_dict().values()]
        results.append([x.detach().cpu() for x in tensors if x is not None])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert {"_fused_adamw_", "convolution_backward"} <= set(gpu.operations)


@pytest.mark.usefixtures("gpu")
def test_module_keeps_its_parameters_when_it_moves() -> None:
    net = network()
    before = list(net.parameters())
    for place in ("cuda", "cpu"):
        net.to(place)
        assert all(a is b and a.device.type == place for a, b in zip(before, net.parameters(), strict=True))


def test_torch_takes_the_branches_of_cuda(gpu: Device) -> None:
    x, w = torch.randn(4, 6, device="cuda"), torch.randn(6, 6, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = x @ w
        types = {
            "matmul": y, "layer_norm": F.layer_norm(y, (6,)), "softmax": y.softmax(1), "sum": y.sum(),
            "gelu": F.gelu(y), "cross_entropy": F.cross_entropy(y, torch.arange(4, device="cuda")),
        }  # fmt: skip
    bf16, fp32 = torch.bfloat16, torch.float32
    expected = {"matmul": bf16, "gelu": bf16}
    assert {name: x.dtype for name, x in types.items()} == {name: expected.get(name, fp32) for name in types}
    torch.testing.assert_close(y.float().cpu(), (x @ w).cpu(), atol=0.1, rtol=0.05)
    parameters = [nn.Parameter(x), nn.Parameter(w)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1, momentum=0.9).step()
    assert "_foreach_add_" in gpu.operations  # chosen on GPUs only
    with gpu.forbid_waits():
        F.one_hot(torch.arange(4, device="cuda"), 5)  # reads the numbers on other devices


MISUSES = {
    "x + host": MixedDevices,
    "torch.cat([x, host])": MixedDevices,
    "torch.stack([x[0], host[0]])": MixedDevices,
    "x.view(2, 2) @ host.view(2, 2)": MixedDevices,
    "host[x.long()]": MixedDevices,
    "host.add_(x)": MixedDevices,
    "x.numpy()": TypeError,
    "np.asarray(x)": TypeError,
    "torch.randn(3, device='cuda', generator=torch.Generator())": RuntimeError,
    "torch.histogram(x, 4)": NotImplementedError,  # has no kernel
    "x.long() @ x.long()": NotImplementedError,
    "F.interpolate(x.byte().view(1, 1, 2, 2), (3, 3), mode='bilinear', antialias=True)": NotImplementedError,
    "x.to('cuda:1')": RuntimeError,
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("expression", MISUSES)
def test_misuse_raises(expression: str) -> None:
    names = {"np": np, "torch": torch, "F": F, "x": torch.arange(4.0, device="cuda")}
    with pytest.raises(MISUSES[expression]):
        eval(expression, {**names, "host": torch.arange(4.0)})


@pytest.mark.parametrize(
    "expression",
    [
        "x[0].item()", "float(x[0])", "bool(x[0] > 0)", "x.tolist()", "x.cpu()", "host.copy_(x)",
        "x.to('cpu', non_blocking=True)", "host.pin_memory().to('cuda')",
        "host.to('cuda', non_blocking=True)",  # is not pinned
        "torch.tensor(3, device='cuda')", "x.new_tensor(3)", "x.nonzero()", "x[x > 1]",
        "x.__setitem__(x > 1, x[:2].clone())", "x[host.long()]", "x.masked_select(x > 1)", "x.unique()",
        "torch.equal(x, x)", "x.repeat_interleave(x.long())", "F.one_hot(x.long())",
        "torch.cuda.synchronize()", "torch.cuda.Event().synchronize()",
    ],
)  # fmt: skip
def test_wait_raises_if_it_is_forbidden(gpu: Device, expression: str) -> None:
    names = {"torch": torch, "F": F, "x": torch.arange(4.0, device="cuda"), "host": torch.arange(4.0)}
    with gpu.forbid_waits():
        with pytest.raises(HostWaits):
            eval(expression, names)
        before = len(gpu.waits)
        with gpu.allow_waits():
            eval(expression, names)
    assert len(gpu.waits) > before


def test_asynchronous_operations_are_no_wait(gpu: Device) -> None:
    host = torch.arange(4.0)
    with gpu.forbid_waits():
        x = host.pin_memory().to("cuda", non_blocking=True)
        assert not host.is_pinned() and torch.empty(4, pin_memory=True)[1:].is_pinned()
        x = torch.where(x > 1, x + torch.tensor(2.0), x)  # a scalar of the host is an argument of the kernel
        x[x > 4] = 0.0
        x.view(2, 2)[torch.zeros(1, dtype=torch.int64, device="cuda")] += torch.full((), 3.0, device="cuda")
        x.repeat_interleave(2, output_size=8)
    assert isinstance(x, CudaTensor) and x.cpu().tolist() == [3.0, 4.0, 4.0, 0.0]
    assert gpu.waits == ["a copy to the host"]


@pytest.mark.usefixtures("gpu")
def test_stream_must_wait_for_the_values_of_another() -> None:
    side = torch.cuda.Stream()
    x = torch.ones(2, device="cuda")
    with torch.cuda.stream(side), pytest.raises(RuntimeError, match="without waiting"):
        x + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    x.add_(1)
    with torch.cuda.stream(side), pytest.raises(RuntimeError, match="without waiting"):
        x + 1
    torch.cuda.current_stream().wait_stream(side)
    assert (y + x).sum().item() == 8


def test_emulation_ends_with_its_block() -> None:
    if not is_supported():
        pytest.skip("needs torch with CUDA and a machine without a GPU")
    with emulate_cuda():
        x = torch.ones(2, device="cuda")
        assert torch.cuda.is_available() and x.is_cuda
    assert not torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="outside of"):
        x + 1
