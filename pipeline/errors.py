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
