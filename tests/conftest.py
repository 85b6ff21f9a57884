"""Toy networks are slower on many threads than on one, and several test runs share a machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
