"""Average pooling to a grid, in its deterministic form and otherwise."""

import pytest
import torch
from questpress.models.pooling import average_pool
from torch.nn.functional import adaptive_avg_pool2d


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("size", "grid"), [((12, 8), (3, 4)), ((7, 7), (2, 4)), ((5, 6), (1, 1))])
def test_pooling_and_its_gradient_are_those_of_torch(
    size: tuple[int, int], grid: tuple[int, int], deterministic: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(2, 3, *grid, dtype=torch.float64, generator=generator)
    expected = adaptive_avg_pool2d(f, grid)
    torch.use_deterministic_algorithms(deterministic)
    try:
        pooled = average_pool(f, grid)
        [gradient] = torch.autograd.grad((pooled * weights).sum(), f)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), f)[0])
