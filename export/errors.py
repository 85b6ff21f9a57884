"""Exceptions of the export package."""


class ExportError(Exception):
    """Exporting, quantizing or timing a network failed."""

    exit_code = 1


class NotInTorchError(ExportError):
    """A graph contains an operator that `int8.torch_graph` does not implement."""


class CalibratorError(ExportError):
    """A calibration method failed on a network's activations; another may succeed."""
