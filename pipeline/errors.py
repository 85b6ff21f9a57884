"""Errors that are reported to the user as one message, with an exit code and without a traceback."""


class QuestpressError(Exception):
    """Base class; ``exit_code`` is 2 for wrong usage and 1 for a failed job."""

    exit_code = 1


class UsageError(QuestpressError):
    """An argument, the config file or the data folder is wrong. Nothing was started."""

    exit_code = 2


class JobError(QuestpressError):
    """The job was started and failed."""


OUT_OF_MEMORY_CLASSES = ("MemoryError", "OutOfMemoryError")

OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN
)


def is_system_fault(error: BaseException | None) -> bool:
    """Return True for an error of the machine, such as a failing disk, and not of a file's content.

    Pillow's own OSErrors have no number.
    """
    return error is not None and (
        (isinstance(error, OSError) and error.errno is not None) or is_out_of_memory(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an out-of-memory error.

    CUDA's has its own class. CUDA's libraries, mps and the CPU raise a RuntimeError with a message.
    """
    if any(cls.__name__ in OUT_OF_MEMORY_CLASSES for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES)
