"""Check this machine for packages, devices, memory and disk space (`compress doctor`)."""

import os
import platform
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from ...export.results import Result
from ..runs.cache import Cache

DISTRIBUTION = "questpress"
HUB = "https://huggingface.co"
HUB_TIMEOUT = 3.0
"""Seconds."""

MIN_MEMORY = 4e9
"""Bytes: twice what a run on the built-in digits takes."""

MIN_DISK = 5e9
"""Free bytes for the decoded images and cached teacher outputs of a small data set."""

COMPILED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "faiss-cpu": "faiss",
}
"""Modules of packages with compiled parts, whose incompatibilities show when they are imported."""

Verdict = Literal["ok", "note", "missing"]


class Finding(Result):
    """The result of one check. A run works with a ``note``, but not if something is ``missing``."""

    group: str
    name: str
    verdict: Verdict
    value: str
    remedy: str | None = None
    """What to do if the verdict is not ``ok``."""


class Diagnosis(Result):
    """All findings in the order of their groups."""

    findings: list[Finding]

    @property
    def can_run(self) -> bool:
        """True if no requirement is missing."""
        return all(finding.verdict != "missing" for finding in self.findings)


def doctor(*, cache: Path | None = None, offline: bool = False) -> Diagnosis:
    """Check this machine.

    Args:
        cache: the cache folder; the user's by default.
        offline: do not check whether weights can be downloaded.
    """
    findings = [*_machine(), *_packages(), *_extras()]
    if not any(finding.verdict == "missing" for finding in findings):
        findings += [*_devices(), *_int8()]
    findings += [*_folders(Cache(cache).root), *([] if offline else [_hub()])]
    return Diagnosis(findings=findings)


def _machine() -> Iterable[Finding]:
    def make(name: str, text: str, verdict: Verdict = "ok", remedy: str | None = None) -> Finding:
        return Finding(group="Machine", name=name, verdict=verdict, value=text, remedy=remedy)

    version = platform.python_version()
    yield make("system", f"{platform.system()} {platform.release()} on {platform.machine()}")
    yield make("Python", f"{version}, {sys.executable}")
    memory = _memory()
    if memory is not None:
        small = memory < MIN_MEMORY
        remedy = "use smaller images or batches (--image-size, --batch-size)" if small else None
        yield make("memory", f"{memory / 1e9:.1f} GB", "note" if small else "ok", remedy)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = free < 64e6
        remedy = "increase it (docker run --shm-size 1g)" if small else None
        yield make("/dev/shm", f"{free / 1e9:.2f} GB free", "note" if small else "ok", remedy)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _requirements() -> list[tuple[Requirement, str | None]]:
    """Return the declared requirements, each with its extra or None."""
    requirements = []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", str(requirement.marker or ""))
        requirements.append((requirement, extra[1] if extra else None))
    return requirements


def _packages() -> Iterable[Finding]:
    for requirement, extra in _requirements():
        if extra is None:
            trouble = _trouble(requirement)
            yield Finding(
                group="Packages",
                name=requirement.name,
                verdict="missing" if trouble else "ok",
                value=trouble or metadata.version(requirement.name),
                remedy=f"pip install '{requirement.name}{requirement.specifier}'" if trouble else None,
            )


def _trouble(requirement: Requirement) -> str | None:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{version} is not {requirement.specifier}"
    if requirement.name in COMPILED:
        try:
            import_module(COMPILED[requirement.name])
        # Libraries that do not fit together fail in many ways when they are loaded.
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            return f"{version} cannot be loaded ({first})"
    return None


def _extras() -> Iterable[Finding]:
    """Check optional packages."""
    serves = {
        "tensorboard": "--tensorboard",
        "wandb": "--track wandb",
        "mlflow": "--track mlflow",
        "openvino": "compress bench --runtime openvino",
    }
    for requirement, extra in _requirements():
        package = requirement.name
        if extra is None or extra == "test" or package not in serves:
            continue
        try:
            yield Finding(group="Extras", name=package, verdict="ok", value=metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(
                group="Extras",
                name=package,
                verdict="note",
                value=f"is not installed; required by {serves[package]}",
                remedy=f"pip install 'questpress[{extra}]'",
            )


def _devices() -> Iterable[Finding]:
    import torch

    from ...export.runtime import allowed_cores
    from ..runs.device import bf16_pays, choose_device, device_name, free_memory

    def make(name: str, text: str, verdict: Verdict = "ok", remedy: str | None = None) -> Finding:
        return Finding(group="Devices", name=name, verdict=verdict, value=text, remedy=remedy)

    yield make("processor", device_name("cpu"))
    there = os.cpu_count() or 1
    allowed = allowed_cores()
    fewer = f" of {there}, by affinity or the container's quota" if allowed < there else ""
    yield make("threads", f"{allowed}{fewer}")
    device = choose_device(None)
    if device == "cuda":
        for number in range(torch.cuda.device_count()):
            name = f"cuda:{number}"
            yield make(name, f"{device_name(name)}, {free_memory(name) / 1e9:.1f} GB free")
    elif device == "mps":
        yield make("mps", "Apple's GPU, through Metal")
    else:
        yield make("GPU", *_without_gpu())
    yield make("trains on", device + (", in bf16 where that pays" if bf16_pays(device) else ", in fp32"))


def _without_gpu() -> tuple[str, Verdict, str | None]:
    import torch

    if not Path("/proc/driver/nvidia/version").exists():
        return "none; training runs on the processor", "ok", None
    if torch.version.cuda is None:
        return (
            "NVIDIA driver found, but torch was built without CUDA",
            "note",
            "pip install --force-reinstall torch torchvision",
        )
    return (
        f"NVIDIA driver found, but torch (built for CUDA {torch.version.cuda}) finds no GPU",
        "note",
        "run nvidia-smi to check the driver",
    )


def _int8() -> Iterable[Finding]:
    from ...export.runtime import detect_target, int8_flags

    target = detect_target()
    flags = ", ".join(int8_flags()) or "none that speed up int8"
    slow = target == "x86" or (target == "arm64" and "asimddp" not in int8_flags())
    yield Finding(
        group="int8",
        name="instruction sets",
        verdict="note" if slow else "ok",
        value=flags,
        remedy="int8 files run, but are hardly faster without VNNI or dot products" if slow else None,
    )
    yield Finding(group="int8", name="--target here", verdict="ok", value=target)


def _folders(cache: Path) -> Iterable[Finding]:
    for name, folder, option in (("cache", cache, "--cache"), ("runs", Path.cwd(), "--out")):
        yield _folder(name, folder, option)


def _folder(name: str, folder: Path, option: str) -> Finding:
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    value = f"{folder}, {free / 1e9:.1f} GB free"
    if not os.access(there, os.W_OK | os.X_OK):
        remedy = f"set another folder with {option}"
        return Finding(
            group="Folders", name=name, verdict="missing", value=f"{folder} cannot be written", remedy=remedy
        )
    if free < MIN_DISK:
        remedy = f"free disk space, or set another folder with {option}"
        return Finding(group="Folders", name=name, verdict="note", value=value, remedy=remedy)
    return Finding(group="Folders", name=name, verdict="ok", value=value)


def _hub(open_: Callable[..., object] = urllib.request.urlopen) -> Finding:
    """Check whether published weights can be downloaded, which is not needed with local weights."""
    remedy = "set --teacher-weights to a file, or copy a Hugging Face cache from another machine"
    try:
        open_(urllib.request.Request(HUB, method="HEAD"), timeout=HUB_TIMEOUT)
    except urllib.error.HTTPError:
        pass  # reachable
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        return Finding(
            group="Internet",
            name="published weights",
            verdict="note",
            value=f"{HUB} cannot be reached ({reason}); cached weights can be used",
            remedy=remedy,
        )
    return Finding(group="Internet", name="published weights", verdict="ok", value=f"{HUB} is reachable")
