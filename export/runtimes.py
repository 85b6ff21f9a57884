"""The runtimes in which a file can be timed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

from .errors import ExportError


@dataclass(frozen=True)
class Runtime:
    """`worker` is the module that serves `bench_worker`'s requests, `load` the function in it that opens a
    file, and `package` what must be installed.
    """

    name: str
    worker: str
    load: str
    package: str
    least: str

    @property
    def script(self) -> tuple[str, ...]:
        return ("-m", f"{__package__}.{self.worker}")

    @property
    def loader(self) -> str:
        """As MODULE:NAME."""
        return f"{__package__}.{self.worker}:{self.load}"

    @property
    def version(self) -> str:
        return version(self.package)


RUNTIMES = {
    one.name: one
    for one in (
        Runtime("onnxruntime", "bench_worker", "in_onnxruntime", "onnxruntime", "1.27"),
        Runtime("openvino", "openvino_worker", "in_openvino", "openvino", "2025.0"),
    )
}


def runtime_named(name: str) -> Runtime:
    """Raises ExportError where there is none of this name, or its package is not installed."""
    if name not in RUNTIMES:
        raise ExportError(f"there is no runtime {name!r}; there are {', '.join(RUNTIMES)}")
    found = RUNTIMES[name]
    if find_spec(found.package) is None:
        raise ExportError(
            f"the runtime {name} is not installed; pip install '{found.package}>={found.least}' brings it"
        )
    return found
