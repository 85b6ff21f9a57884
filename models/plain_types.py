"""Stand-ins for plain types in torch checkpoints: their values are read without running the types' own code.

torch's restricted unpickler calls what is listed here instead of the class that a file names.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Unread:
    """Any value that is not needed, such as a path, a date or a command line. Its parts are dropped."""

    def __new__(cls, *_: Any) -> "Unread":
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class DictLike:
    """A dict with additions, read as an OrderedDict, to which the unpickler adds entries."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class NumpyType:
    """A dtype as its name and byte order."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def decode(self, content: bytes) -> list[Any]:
        """Return the numbers, or strings, in the bytes of an array; [None] for other types."""
        if not re.fullmatch(r"[biufU]\d{1,9}", self.name):
            return [None]
        # No bytes are pickled as a call of the type.
        content = b"" if isinstance(content, Unread) else content
        values: list[Any] = np.frombuffer(content, self.order + self.name).tolist()
        return values


class ListLike(list[Any]):
    """A list; of arrays, only those of one dimension have values."""

    def __new__(cls, *_: Any) -> "ListLike":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, content = state
        if len(shape) == 1:
            self[:] = content if isinstance(content, list) else dtype.decode(content)


def _read_scalar(dtype: NumpyType, content: bytes) -> Any:
    return dtype.decode(content)[0]


_BUILTINS = (
    "bool", "bytes", "dict", "float", "frozenset", "int", "list", "range", "slice", "str", "tuple",
)  # fmt: skip
_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")

_MEMBERS: list[tuple[Callable[..., Any], str, Sequence[str]]] = [
    (Unread, "argparse", ["Namespace"]),
    (Unread, "builtins", _BUILTINS),
    (Unread, "datetime", ["date", "datetime", "time", "timedelta", "timezone"]),
    (Unread, "decimal", ["Decimal"]),
    (Unread, "fractions", ["Fraction"]),
    (Unread, "numpy", ["float16", "float32", "float64", "int32", "int64", "uint8"]),
    (Unread, "pathlib", _PATHS),
    (Unread, "pathlib._local", _PATHS),
    (Unread, "torch.torch_version", ["TorchVersion"]),
    (Unread, "types", ["SimpleNamespace"]),
    (Unread, "uuid", ["UUID"]),
    (DictLike, "addict.addict", ["Dict"]),
    (DictLike, "collections", ["defaultdict"]),
    (DictLike, "easydict", ["EasyDict"]),
    (DictLike, "lightning.fabric.utilities.data", ["AttributeDict"]),
    (DictLike, "lightning_fabric.utilities.data", ["AttributeDict"]),
    (DictLike, "pytorch_lightning.utilities.parsing", ["AttributeDict"]),
    (DictLike, "yacs.config", ["CfgNode"]),
    (ListLike, "collections", ["deque"]),
    (ListLike, "numpy", ["ndarray"]),
    (ListLike, "numpy.core.multiarray", ["_reconstruct"]),
    (ListLike, "numpy._core.multiarray", ["_reconstruct"]),
    (NumpyType, "numpy", ["dtype"]),
    (_read_scalar, "numpy.core.multiarray", ["scalar"]),
    (_read_scalar, "numpy._core.multiarray", ["scalar"]),
]

PLAIN_TYPES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (stand_in, f"{module}.{name}") for stand_in, module, names in _MEMBERS for name in names
]
"""For ``torch.serialization.safe_globals``."""
