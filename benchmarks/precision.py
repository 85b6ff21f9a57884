"""Training and inference rates in fp32 and bf16 on this machine: what ``pipeline/device.py`` chooses by.

    python benchmarks/precision.py --size 64 --networks mobilenetv2_100,resnet50,resnet18

Random images and weights, channels last, AdamW, one process; images a second, the best of three measurements.
"""

import argparse
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from questpress.pipeline.device import Engine, choose_device, choose_engine, use_threads


def rate(step: Callable[[], None], images: int, device: str) -> float:
    """Images a second of a step, the best of three runs of at least a second, after one step to warm up."""
    step()
    best = 0.0
    for _ in range(3):
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < 1:
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            done += images
        best = max(best, done / (time.perf_counter() - started))
    return best


def measure(name: str, size: int, batch: int, engine: Engine) -> tuple[float, float]:
    """(training, inference) rates of a network."""
    network = timm.create_model(name, num_classes=10).to(engine.device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=engine.device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=engine.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def train() -> None:
        with engine.autocast():
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def infer() -> None:
        with torch.no_grad(), engine.autocast():
            network(images)

    network.train()
    training = rate(train, batch, engine.device)
    network.eval()
    return training, rate(infer, batch, engine.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="mobilenetv2_100,resnet50,resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device")
    options = parser.parse_args()
    device = choose_device(options.device)
    print("| network | precision | training, images/s | inference, images/s | chosen for training |")
    print("|---|---|---|---|---|")
    for name in options.networks.split(","):
        chosen = choose_engine(device, "auto", timm.create_model(name, num_classes=10))
        use_threads(chosen.threads)
        for precision in ("fp32", "bf16"):
            engine = Engine(device, chosen.threads, precision)
            training, inference = measure(name, options.size, options.batch, engine)
            mark = "yes" if chosen.precision == precision else ""
            print(f"| {name} | {precision} | {training:.0f} | {inference:.0f} | {mark} |", flush=True)


if __name__ == "__main__":
    main()
