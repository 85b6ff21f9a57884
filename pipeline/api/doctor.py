"""Check this machine for packages, devices, memory and disk space (`compress doctor`)."""

import os
import platform
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from ...export.results import Result
from ..runs import process
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

REQUIRED_BY = {
    "tensorboard": "--tensorboard",
    "wandb": "--track wandb",
    "mlflow": "--track mlflow",
    "openvino": "compress bench --runtime openvino",
}
"""Options that require an optional package."""

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

    def __repr__(self) -> str:
        return "\n".join(f"{f.group}, {f.name} ({f.verdict}): {f.value}" for f in self.findings)


def doctor(*, cache: Path | None = None, offline: bool = False) -> Diagnosis:
    """Check this machine; ``offline`` skips the check whether weights can be downloaded."""
    findings = [*_machine(), *_packages(), *_extras()]
    if not any(finding.verdict == "missing" for finding in findings):
        findings += [*_devices(), *_int8()]
    findings += [_folder("cache", Cache(cache).root, "--cache"), _folder("runs", Path.cwd(), "--out")]
    return Diagnosis(findings=findings if offline else [*findings, _hub()])


def _finding(
    group: str, name: str, value: str, remedy: str | None = None, verdict: Verdict | None = None
) -> Finding:
    verdict = verdict or ("note" if remedy else "ok")
    return Finding(group=group, name=name, verdict=verdict, value=value, remedy=remedy)


def _machine() -> Iterable[Finding]:
    make = partial(_finding, "Machine")
    yield make("system", f"{platform.system()} {platform.release()} on {platform.machine()}")
    yield make("Python", f"{platform.python_version()}, {sys.executable}")
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        pass
    else:
        remedy = "use smaller images or batches (--image-size, --batch-size)" if memory < MIN_MEMORY else None
        yield make("memory", f"{memory / 1e9:.1f} GB", remedy)
    if (ignored := process.describe_ignored_variables()) is not None:
        variables, _, remedy = ignored.partition(": ")
        yield make("environment", variables, remedy)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        remedy = "increase it (docker run --shm-size 1g)" if free < 64e6 else None
        yield make("/dev/shm", f"{free / 1e9:.2f} GB free", remedy)


def _requirements() -> list[tuple[Requirement, str | None]]:
    """Return the declared requirements, each with its extra or None."""
    requirements = []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", str(requirement.marker or ""))
        requirements.append((requirement, extra[1] if extra else None))
    return requirements


def _packages() -> Iterable[Finding]:
    make = partial(_finding, "Packages")
    for requirement, extra in _requirements():
        name = requirement.name
        if extra is None and (trouble := _trouble(requirement)):
            yield make(name, trouble, f"pip install '{name}{requirement.specifier}'", "missing")
        elif extra is None:
            yield make(name, metadata.version(name))


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
    make = partial(_finding, "Extras")
    for requirement, extra in _requirements():
        package = requirement.name
        if extra is None or extra == "test" or package not in REQUIRED_BY:
            continue
        try:
            yield make(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            value = f"is not installed; required by {REQUIRED_BY[package]}"
            yield make(package, value, f"pip install '{package}{requirement.specifier}'")


def _devices() -> Iterable[Finding]:
    import torch

    from ...export.runtime import allowed_cores
    from ..runs.device import choose_device, device_name, fastest_precision, free_memory

    make = partial(_finding, "Devices")
    yield make("processor", device_name("cpu"))
    cores, allowed = os.cpu_count() or 1, allowed_cores()
    limit = f" of {cores}, by affinity or the container's quota" if allowed < cores else ""
    yield make("threads", f"{allowed}{limit}")
    device = choose_device(None)
    if device == "cuda":
        for number in range(torch.cuda.device_count()):
            name = f"cuda:{number}"
            yield make(name, f"{device_name(name)}, {free_memory(name) / 1e9:.1f} GB free")
    elif device == "mps":
        yield make("mps", "Apple's GPU, through Metal")
    elif not Path("/proc/driver/nvidia/version").exists():
        yield make("GPU", "none; training runs on the processor")
    elif torch.version.cuda is None:
        remedy = "pip install --force-reinstall torch torchvision"
        yield make("GPU", "NVIDIA driver found, but torch was built without CUDA", remedy)
    else:
        value = f"NVIDIA driver found, but torch (built for CUDA {torch.version.cuda}) finds no GPU"
        yield make("GPU", value, "run nvidia-smi to check the driver")
    precision = fastest_precision(device)
    yield make("trains on", f"{device}, in {precision}" + (" where that pays" if precision != "fp32" else ""))


def _int8() -> Iterable[Finding]:
    from ...export.runtime import detect_target, int8_flags, lacks_dot_products

    target = detect_target()
    flags = ", ".join(int8_flags()) or "none that speed up int8"
    slow = target == "x86" or lacks_dot_products()
    remedy = "int8 files run, but are hardly faster without VNNI or dot products" if slow else None
    yield _finding("int8", "instruction sets", flags, remedy)
    yield _finding("int8", "--target here", target)


def _folder(name: str, folder: Path, option: str) -> Finding:
    make = partial(_finding, "Folders", name)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return make(f"{folder} cannot be written", f"set another folder with {option}", "missing")
    free = shutil.disk_usage(existing).free
    remedy = f"free disk space, or set another folder with {option}" if free < MIN_DISK else None
    return make(f"{folder}, {free / 1e9:.1f} GB free", remedy)


def _hub(open_: Callable[..., object] = urllib.request.urlopen) -> Finding:
    """Check whether published weights can be downloaded, which is not needed with local weights."""
    make = partial(_finding, "Internet", "published weights")
    try:
        open_(urllib.request.Request(HUB, method="HEAD"), timeout=HUB_TIMEOUT)
    except urllib.error.HTTPError:
        pass  # reachable
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        value = f"{HUB} cannot be reached ({reason}); cached weights can be used"
        remedy = "set --teacher-weights to a file, or copy a Hugging Face cache from another machine"
        return make(value, remedy)
    return make(f"{HUB} is reachable")
