"""k-means over many features: seconds and memory for QuEST's vocabulary, in memory and streamed from a file.

    python -m benchmarks.training.vocabulary --features 3200000 --channels 64 --words 4096

Features are positive and clustered, as after a network's last ReLU: mixtures of 1,000 centers. CIFAR-100's
50,000 images give 3.2 million at 8×8 positions.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from questpress.export.runtime import allowed_cores
from questpress.pipeline.methods.quest.vocabulary import FeatureMatrix
from questpress.pipeline.runs.device import use_threads

BATCH, SIDE, CENTERS = 256, 8, 1000


def maps(features: int, channels: int) -> Iterator[torch.Tensor]:
    """Yield maps [B,C,8,8] with at least this number of features in all."""
    random = torch.Generator().manual_seed(0)
    centers = torch.rand(CENTERS, channels, generator=random) * 3
    for _ in range(-(-features // (BATCH * SIDE * SIDE))):
        chosen = centers[torch.randint(0, CENTERS, (BATCH, SIDE, SIDE), generator=random)]
        noisy = chosen + torch.randn(chosen.shape, generator=random)
        yield noisy.relu().permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=3_200_000)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--words", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--streamed", action="store_true", help="from a file, in half precision")
    options = parser.parse_args()
    use_threads(allowed_cores())
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        file = Path(folder) / "features.f16" if options.streamed else None
        held = FeatureMatrix(options.features, options.channels, file)
        made = BATCH * SIDE * SIDE * -(-options.features // (BATCH * SIDE * SIDE))
        assert held.fill(maps(options.features, options.channels), (SIDE, SIDE), made)
        filled = time.perf_counter()
        held.kmeans(options.words, options.iterations, 0)
        ended = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{options.features:,} features of {options.channels} channels, {options.words} words, "
        f"{options.iterations} iterations, {torch.get_num_threads()} threads, "
        f"{'streamed' if options.streamed else 'in memory'}: filled in {filled - started:.0f} s, k-means in "
        f"{ended - filled:.0f} s, at most {memory:.1f} GiB"
    )


if __name__ == "__main__":
    main()
