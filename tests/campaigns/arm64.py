"""Outputs of an artifact on emulated Arm processors, compared with those of this machine.

    apt-get install mmdebstrap qemu-user
    mmdebstrap --arch=arm64 --variant=extract --include=python3,libstdc++6 bookworm arm64
    python -m tests.campaigns.arm64 runs/shop/artifact photos/test --root arm64

The run needs ``--target arm64``. QEMU must be 8.1 or later, which emulates /proc/cpuinfo; Debian 12 has it in
backports. The first call installs this machine's versions of the runtime's three packages for arm64 in the
root. Times are those of the emulation and are not reported.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from questpress.export.int8.targets import is_exact_here
from questpress.export.runtime import read_manifest, readable_formats

from benchmarks.cells import markdown

PROCESSORS = {
    "cortex-a53": "Cortex-A53 (Raspberry Pi 3)",
    "cortex-a72": "Cortex-A72 (Raspberry Pi 4)",
    "cortex-a76": "Cortex-A76 (Raspberry Pi 5), dot products",
    "cortex-a710": "Cortex-A710 (phones), dot products and i8mm",
}
"""QEMU's names."""
PACKAGES = ("onnxruntime", "numpy", "pillow")
WORKER = """
import sys, zlib
artifact, output, *files = sys.argv[1:4] + sys.stdin.read().splitlines()
sys.path.insert(0, artifact)
import numpy as np
from questpress_runtime.runtime import Classifier, decode_image, render
default = Classifier.load(artifact)
split = files.index("")
models = [Classifier.load(artifact, file=name, threads=1) for name in files[:split]]
pixels = [render(default.decode(image), default.preprocessing) for image in files[split + 1 :]]
outputs = {
    model.name: np.concatenate([model.predict_logits(image[None]) for image in pixels]) for model in models
}
np.savez(output, default=default.name, pixels=np.stack(pixels), **outputs)
"""
"""Program that runs the artifact's own runtime here and on the emulated processor."""


def install_packages(root: Path) -> Path:
    """Install this machine's versions of the runtime's packages for arm64; return their folder."""
    folder = root / "packages"
    if not folder.exists():
        python = (root / "usr/bin/python3").resolve().name.removeprefix("python")
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
        wanted = [f"{name}=={version(name)}" for name in PACKAGES]
        options = ["--only-binary=:all:", f"--python-version={python}", f"--target={folder}"]
        subprocess.run([sys.executable, "-m", "pip", "install", *platforms, *options, *wanted], check=True)
    return folder


def run_worker(command: list[str], artifact: Path, lines: list[str]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "outputs.npz")
        arguments = [*command, "-c", WORKER, str(artifact), str(output)]
        subprocess.run(arguments, input="\n".join(lines), text=True, check=True)
        with np.load(output) as arrays:
            return dict(arrays)


def compare(arm: dict[str, np.ndarray], here: dict[str, np.ndarray], fp32: str, int8: str) -> list[str]:
    """Return a processor's row: differences of pixels and logits, equal predictions, and the default file."""
    pixels, *logits = (np.abs(arm[name].astype(float) - here[name]).max() for name in ("pixels", fp32, int8))
    same = int((arm[int8].argmax(1) == here[int8].argmax(1)).sum())
    agreement = f"{same:,} of {len(here[int8]):,}"
    return [f"{pixels:g}", *(f"{value:.1e}" for value in logits), agreement, str(arm["default"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("artifact", type=Path, help="artifact folder of a classifier")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--root", type=Path, required=True, help="arm64 system with Python")
    parser.add_argument("--limit", type=int, default=1000, help="number of images (default 1000)")
    parser.add_argument("--qemu", default="qemu-aarch64", help="the emulator")
    options = parser.parse_args()
    folder, manifest = read_manifest(options.artifact)
    names = {entry["precision"]: entry["name"] for entry in manifest["files"] if entry["target"] is None}
    int8 = next((entry["name"] for entry in manifest["files"] if entry["target"] == "arm64"), None)
    if int8 is None:
        parser.error(f"{folder} contains no int8 file for arm64. Export the run with --target arm64.")
    if not is_exact_here("arm64"):
        parser.error("this processor computes int8 files for arm64 inexactly. Use one with VNNI.")
    images = sorted(file for file in options.images.rglob("*") if file.suffix.lower() in readable_formats())
    images = images[:: max(1, len(images) // options.limit)][: options.limit]
    lines = [names["fp32"], int8, "", *(str(image.resolve()) for image in images)]
    here = run_worker([sys.executable], folder.resolve(), lines)
    os.environ["PYTHONPATH"] = str(install_packages(options.root).resolve())
    python = str(options.root / "usr/bin/python3")
    rows = []
    for processor, description in PROCESSORS.items():
        command = [options.qemu, "-L", str(options.root), "-cpu", processor, python]
        arm = run_worker(command, folder.resolve(), lines)
        rows.append([description, *compare(arm, here, names["fp32"], int8)])
        print(processor, "done", file=sys.stderr)
    columns = ["processor", "pixels", "fp32 logits", "int8 logits", "int8 predictions", "default file"]
    print(f"{len(images):,} images, largest differences to x86 and equal predictions:\n")
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
