"""An emulated CUDA device for tests on machines without a GPU: tensors of ``cuda:0`` with values on the host.

    with emulate_cuda() as gpu:
        task = build_task(Engine("cuda", 1, "bf16"))
        with gpu.forbid_waits():
            task(images, labels)["loss"].backward()

A tensor of the device is a wrapper that reports ``cuda:0`` to Python and to torch's C++ code, so torch itself
takes the branches of CUDA: device checks, autocast's rules, multi-tensor and fused optimizers. Each operation
is checked and then computed on the CPU from the values in ``CudaTensor.host``. It raises

- if tensors are on different devices (0-dim CPU tensors are allowed in elementwise operations, as in CUDA);
- for ``.numpy()`` of a device tensor, and for generators of the other device;
- for an operation without a CUDA kernel, and for types that some CUDA kernels do not support;
- if the host waits for the device, within ``forbid_waits``: ``.item()``, ``bool``, ``.cpu()``, ``nonzero``,
  indexing by a mask or by a tensor of the host, a blocking copy or one from memory that is not pinned, …;
- if a stream uses values of another one for which it has not waited.

What it cannot show: no CUDA kernel runs, so neither its rounding, determinism, speed and memory, nor the
kernels' limits beyond ``UNSUPPORTED``. cuDNN and fused attention are off. Streams run one after the other.
torch.compile and several ranks are not emulated. Checkpoints contain CPU tensors. ``gradients.py`` replaces
autograd's engine. That a stream reads values which another one overwrites is not found.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.support import gradients

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
NAME = "NVIDIA Emulation"

WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "nms",
}  # fmt: skip
"""Operations for which the host waits, since it needs their result or its size."""

INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}

INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}

UNSUPPORTED = {
    **dict.fromkeys(("mm", "bmm", "addmm", "addmv", "baddbmm", "mv", "dot", "convolution"), INTEGERS),
    "_upsample_bilinear2d_aa": {torch.uint8},
    "_upsample_bicubic2d_aa": {torch.uint8},
}
"""Types for which CPU kernels exist and CUDA kernels do not."""

FORMS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.dtype: lambda a, b, dtype: torch.mm(a.to(dtype), b.to(dtype)),
}
"""What CUDA kernels without one for CPUs compute."""


class HostWaits(AssertionError):
    """The host waits for the device where it must not."""


class MixedDevices(RuntimeError):
    """An operation's tensors are on different devices."""


class CudaTensor(Tensor):
    """A tensor of the emulated device. ``host`` has its values."""

    host: Tensor
    stream: "Stream"
    """The stream that has computed it, after ``time`` operations."""
    time: int

    @staticmethod
    def __new__(cls, host: Tensor) -> "CudaTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CUDA,
        )
        tensor.host = host
        tensor.stream = _device().streams[-1]
        tensor.time = tensor.stream.time
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _device().dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = _FUNCTIONS.get(func, func)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.host!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = CudaTensor(self.host.clone()).requires_grad_(self.requires_grad)
        copied.__dict__ = {**self.__dict__, **copied.__dict__}  # whether it is a parameter
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)


class Stream:
    """A stream counts its operations and remembers how far it has waited for the others."""

    def __init__(self, device: Any = None) -> None:
        self.time = 0
        self.waited: defaultdict[Stream, int] = defaultdict(lambda: -1)

    def wait_stream(self, other: "Stream") -> None:
        for stream, time in (*other.waited.items(), (other, other.time)):
            self.waited[stream] = max(self.waited[stream], time)


class Event:
    """An event that its stream reaches at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0

    def record(self, stream: Stream | None = None) -> None:
        self.time = (stream or _device().streams[-1]).time

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _device().wait("Event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        return float(end.time - self.time)


class Generator(torch.Generator):
    """A generator of the host, or one of the device that draws the host's numbers."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        generator = super().__new__(cls)
        if torch.device(device).type == "cuda":
            _device().generators[generator._cdata] = generator
        return generator


class Device(TorchDispatchMode):
    """The state of the device, and the mode that catches operations without a tensor of it."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = [Stream()]
        """The default stream, and those of the ``with`` statements."""
        self.forbids_waits = False
        self.waits: list[str] = []
        """Operations for which the host has waited."""
        self.operations: list[str] = []
        """Operations of the device."""
        self.pinned: dict[int, StorageWeakRef] = {}
        self.generators: dict[int, Generator] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # compiled code is not emulated, and importing the compiler takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    @contextmanager
    def forbid_waits(self, forbid: bool = True) -> Iterator[None]:
        """Raise HostWaits in the block if the host waits for the device."""
        before, self.forbids_waits = self.forbids_waits, forbid
        try:
            yield
        finally:
            self.forbids_waits = before

    def allow_waits(self) -> Any:
        """Permit waiting within ``forbid_waits``, for metrics and saving."""
        return self.forbid_waits(False)

    def wait(self, reason: str) -> None:
        if self.forbids_waits:
            raise HostWaits(f"the host waits for the device: {reason}")
        self.waits.append(reason)

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = _find_tensors([args, *kwargs.values()])
        ours = [x for x in tensors if isinstance(x, CudaTensor)]
        target = kwargs.get("device")
        name = func._schema.name.partition("::")[2]
        if not ours and (target is None or target.type != "cuda"):
            return self._dispatch_host(name, func, args, kwargs)
        if target is not None and target.type == "cuda" and target.index not in (None, 0):
            raise RuntimeError("CUDA error: invalid device ordinal")
        self._check(name, func, args, kwargs, tensors)
        stream = self.streams[-1]
        stream.time += 1
        self.operations.append(name)
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # changes the wrapper's shape
                func(*args, **kwargs)
        changes = {key: value for key, value in (("device", CPU), ("pin_memory", False)) if key in kwargs}
        host_args = [_map(_to_host, x) for x in args]
        host_kwargs = {key: _map(_to_host, x) for key, x in {**kwargs, **changes}.items()}
        result = FORMS.get(func, func)(*host_args, **host_kwargs)
        for given, argument in zip(args, func._schema.arguments, strict=False):
            if argument.is_write:
                for written in _find_tensors([given]):
                    written.stream, written.time = stream, stream.time
        if target is not None and target.type == "cpu":
            return result
        inputs = {id(x.host): x for x in ours} | {id(x): x for x in tensors if not isinstance(x, CudaTensor)}

        def wrap(x: Any) -> Any:
            return CudaTensor(x) if isinstance(x, Tensor) and id(x) not in inputs else inputs.get(id(x), x)

        return _map(wrap, result)

    def _dispatch_host(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name == "_pin_memory":
            return self.pin(args[0])
        if kwargs.get("pin_memory"):
            return self.pin(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)

    def pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        storage = pinned.untyped_storage()
        self.pinned[storage._cdata] = StorageWeakRef(storage)
        return pinned

    def _is_pinned(self, tensor: Tensor) -> bool:
        storage = self.pinned.get(tensor.untyped_storage()._cdata)
        return storage is not None and not storage.expired()

    def _check(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], tensors: Sequence[Any]) -> None:
        ours = [x for x in tensors if isinstance(x, CudaTensor)]
        if name in ("_to_copy", "copy_"):
            self._check_copy(name, args, kwargs)
        elif len(ours) < len(tensors) and not name.startswith("new_") and not name.endswith("_like"):
            self._check_devices(name, func, args, tensors)
        for tensor in ours:
            if tensor.stream is not self.streams[-1] and self.streams[-1].waited[tensor.stream] < tensor.time:
                raise RuntimeError(f"{func} uses a tensor of another stream without waiting for it")
            if tensor.dtype in UNSUPPORTED.get(name, ()):
                raise NotImplementedError(f'"{name}_cuda" not implemented for {tensor.dtype}')
        if ours and not _has_kernel(func.name()):
            raise NotImplementedError(f"Could not run '{func}' with arguments from the 'CUDA' backend")
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in self.generators:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(str(func))
        if name in INDEXING:
            indices = _find_tensors(args[1])
            masks = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
            fills = name != "index" and len(indices) == 1 and args[2].numel() == 1  # is a masked_fill
            if masks and not fills:
                self.wait(f"{func} by a mask")

    def _check_copy(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name == "copy_":
            device, source, non_blocking = args[0].device, args[1], len(args) > 2 and args[2]
        else:
            source, non_blocking = args[0], kwargs.get("non_blocking", False)
            device = kwargs.get("device") or source.device
        if device.type == source.device.type:
            return
        if device.type == "cpu":
            self.wait("a copy to the host")
        elif not non_blocking:
            self.wait("a blocking copy to the device")
        elif not self._is_pinned(source):
            self.wait("a copy from memory that is not pinned")

    def _check_devices(self, name: str, func: Any, args: Any, tensors: Sequence[Tensor]) -> None:
        others = [x for x in tensors if not isinstance(x, CudaTensor)]
        if name in INDEXING and isinstance(args[0], CudaTensor):
            indices = _find_tensors(args[1])
            if any(x is y for x in others for y in indices):
                self.wait(f"{func} by indices on the host")
            others = [x for x in others if all(x is not y for y in indices)]
        allowed = torch.Tag.pointwise in func.tags or name in INDEXING or name in ("fill_", "fill")
        if any(x.dim() or not allowed for x in others):
            shapes = ", ".join(f"{x.device} {tuple(x.shape)}" for x in tensors)
            raise MixedDevices(f"Expected all tensors of {func} to be on the same device, got {shapes}")


_active: list[Device] = []


def _device() -> Device:
    if not _active:
        raise RuntimeError("a tensor of the emulated device is used outside of emulate_cuda()")
    return _active[-1]


def _find_tensors(arguments: Sequence[Any]) -> list[Any]:
    """Return the tensors among arguments of an operation, and in lists of them."""
    tensors: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, list | tuple):
            tensors += _find_tensors(x)
    return tensors


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    return type(x)(_map(function, y) for y in x) if isinstance(x, list | tuple) else function(x)


def _to_host(x: Any) -> Any:
    return x.host if isinstance(x, CudaTensor) else x


@cache
def _has_kernel(name: str) -> bool:
    return bool(torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA"))


# Functions of Python that get a tensor of the device.


def _numpy(tensor: Tensor, *_: Any, **__: Any) -> None:
    raise TypeError(f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() first.")


def _set_data(tensor: CudaTensor, value: CudaTensor) -> None:
    if not isinstance(value, CudaTensor):
        raise MixedDevices("the data of a tensor of the device is set to a tensor of the host")
    Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
    tensor.host = value.host


def _record_stream(tensor: Tensor, _: Stream) -> None:
    if not isinstance(tensor, CudaTensor):
        raise NotImplementedError("record_stream of a tensor of the host")


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    Tensor.backward: gradients.backward,
    torch.autograd.grad: gradients.grad,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.tolist: lambda tensor: tensor.cpu().tolist(),
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}


# Functions of torch that have no tensor as an argument.


def _load_tensors(load: Callable[..., Any], *args: Any, map_location: Any = "cpu", **options: Any) -> Any:
    content = load(*args, map_location="cpu", **options)
    return tree_map(lambda x: x.to(map_location) if isinstance(x, Tensor) else x, content)


def _swap(a: Tensor, b: Tensor) -> None:
    """Exchange two tensors, like torch.utils.swap_tensors but whatever else refers to them."""
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


@contextmanager
def _use_stream(device: Device, stream: Stream) -> Iterator[None]:
    device.streams.append(stream)
    try:
        yield
    finally:
        device.streams.pop()


def is_supported() -> bool:
    """Return True if torch is built for CUDA, whose autograd code is used, and there is no GPU."""
    is_built = torch.backends.cuda.is_built() and hasattr(torch._C, "_ensureCUDADeviceGuardSet")
    return is_built and not torch.cuda.is_available()


@contextmanager
def emulate_cuda() -> Iterator[Device]:
    """Emulate a CUDA device in the block."""
    device = Device()
    torch._C._ensureCUDADeviceGuardSet()  # what torch's fake tensors use without a driver
    functions = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda **_: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda _=None: (9, 0),
        "set_device": lambda _: None,
        "device": lambda _: nullcontext(),
        "get_device_name": lambda _=None: NAME,
        "get_device_properties": lambda _=None: SimpleNamespace(L2_cache_size=1 << 25),
        "mem_get_info": lambda _=None: (8 << 30, 16 << 30),
        "max_memory_allocated": lambda _=None: 1 << 20,
        "reset_peak_memory_stats": lambda _=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda _=None: device.wait("torch.cuda.synchronize"),
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda _=None: device.streams[-1],
        "stream": lambda stream: _use_stream(device, stream),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            patch.setattr(torch.cuda, name, function)
        patch.setattr(torch, "Generator", Generator)
        # The DataLoader's thread is outside of the mode.
        patch.setattr(Tensor, "pin_memory", lambda tensor, *_: device.pin(tensor))
        patch.setattr(Tensor, "record_stream", _record_stream)
        patch.setattr(torch, "load", partial(_load_tensors, torch.load))
        patch.setattr(torch.utils, "swap_tensors", _swap)
        # Parameters keep their identity when modules move, as they do for real devices.
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        optim = sys.modules[torch.optim.Optimizer.__module__]
        patch.setattr(optim, "_foreach_supported_types", [*optim._foreach_supported_types, CudaTensor])
        patch.setattr(torch.backends.cudnn, "enabled", False)
        attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        _active.append(device)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor copies to the device by an operation
        try:
            with attention, device:
                yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            _active.pop()
