"""The job: data, methods, training, stages, report and the command line.

``questpress.pipeline.compress(teacher=…, student=…, data=…)`` is the command as a function.
"""

from typing import Any

__all__ = ["compress"]


def __getattr__(name: str) -> Any:
    if name == "compress":  # torch comes with it, and `--help` does not wait for torch
        from .api.run import compress

        return compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
