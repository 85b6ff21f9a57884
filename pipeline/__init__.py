"""Data, methods, training, stages, report and command line.

The functions here are the commands: ``questpress.pipeline.compress(teacher=…, student=…, data=…)`` is
``compress --teacher … --student … --data …``.
"""

from importlib import import_module
from typing import Any

from ..export.results import Result

FUNCTIONS = {
    "bench": "api.bench",
    "compare": "api.compare",
    "compress": "api.run",
    "export": "api.run",
    "predict": "api.predict",
    "sweep": "api.sweep",
    "validate": "api.validate.validate",
}

__all__ = list(FUNCTIONS)


def _draw(result: Result) -> tuple[str, str] | None:
    from .report.terminal import draw

    return draw(result)


Result.draw = _draw


def __getattr__(name: str) -> Any:
    """Import a function when it is used, since most of them import torch."""
    if name in FUNCTIONS:
        return getattr(import_module(f".{FUNCTIONS[name]}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
