"""What goes wrong for a person at the keyboard: one sentence each, saying what, where and what to do."""


class QuestpressError(Exception):
    """A failure that is told in one sentence; the command line prints it without a traceback.

    ``exit_code`` is 2 for wrong usage and 1 for a job that failed.
    """

    exit_code = 1


class UsageError(QuestpressError):
    """Something in the arguments, the config file or the data folder is wrong; nothing was started."""

    exit_code = 2


class JobError(QuestpressError):
    """The job was understood and started, but could not be finished."""

    exit_code = 1


_SENTENCES = (
    "can't allocate memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN's
)
_CLASSES = ("MemoryError", "OutOfMemoryError")


def out_of_memory(error: BaseException) -> bool:
    """A GPU's out-of-memory has a class of its own; its libraries', mps's and a CPU's are sentences."""
    named = any(cls.__name__ in _CLASSES for cls in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and any(words in str(error) for words in _SENTENCES))
