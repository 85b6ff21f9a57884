"""Toy networks are slower on many threads than on one, and several test runs share a machine."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell has its background jobs ignore Ctrl-C, and so would every process that a test starts there.
signal.signal(signal.SIGINT, signal.default_int_handler)
