"""What can be wrong with a model's name or weights, told in one sentence."""


class ModelError(Exception):
    """A model cannot be built or its weights cannot be had or do not fit (a failed job, exit code 1)."""

    exit_code = 1


class UnknownModel(ModelError):
    """The name is not one timm knows, or cannot serve in this role (wrong usage, exit code 2)."""

    exit_code = 2
