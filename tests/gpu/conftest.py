"""The emulated device as a fixture."""

from collections.abc import Iterator

import pytest

from tests.support.emulated_cuda import Device, emulate_cuda, is_supported


@pytest.fixture
def gpu() -> Iterator[Device]:
    if not is_supported():
        pytest.skip("needs torch with CUDA and a machine without a GPU")
    with emulate_cuda() as device:
        yield device
