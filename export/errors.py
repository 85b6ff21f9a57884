"""What can go wrong between a trained network and the file that ships, told in one sentence."""


class ExportError(Exception):
    """Exporting, quantizing or timing a network failed (exit code 1)."""

    exit_code = 1


class NotInTorchError(ExportError):
    """A graph with something in it that `graph_operators` cannot compute."""


class CalibratorError(ExportError):
    """A calibrator that cannot cope with a network's activations; another may."""
