"""Whether an error says that memory has run out, in one of the many ways there are to say so."""

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
