"""`compress doctor`: what this machine has for the job, what is missing, and how to get it."""

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
ANSWERS_WITHIN = 3.0
"""Seconds for the hub to answer."""

LEAST_MEMORY = 4e9
"""Bytes; the job on the built-in digits takes half of that, and a GPU's host needs no less."""

LEAST_DISK = 5e9
"""Bytes free for decoded images and teachers' answers of a small set."""

COMPILED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "faiss-cpu": "faiss",
}
"""package -> module: those whose parts must fit each other and the system, which shows when they load."""

Verdict = Literal["ok", "note", "missing"]


class Finding(Result):
    """One thing that was looked at. ``note``: the job runs without it; ``missing``: it does not."""

    group: str
    name: str
    verdict: Verdict
    told: str
    remedy: str | None = None
    """What to do, where it is not ``ok``."""


class Diagnosis(Result):
    """Everything that was looked at, in the order of the groups."""

    findings: list[Finding]

    @property
    def fit(self) -> bool:
        """Whether the job can run here."""
        return all(one.verdict != "missing" for one in self.findings)


def doctor(*, cache: Path | None = None, offline: bool = False) -> Diagnosis:
    """Look at this machine.

    Args:
        cache: the folder that runs share; the user's by default.
        offline: don't ask the internet whether weights can be downloaded.
    """
    findings = [*_machine(), *_packages(), *_extras()]
    if not any(one.verdict == "missing" for one in findings):
        findings += [*_devices(), *_int8()]
    findings += [*_folders(Cache(cache).root), *([] if offline else [_hub()])]
    return Diagnosis(findings=findings)


def _machine() -> Iterable[Finding]:
    def told(name: str, text: str, verdict: Verdict = "ok", remedy: str | None = None) -> Finding:
        return Finding(group="Machine", name=name, verdict=verdict, told=text, remedy=remedy)

    version = platform.python_version()
    yield told("system", f"{platform.system()} {platform.release()} on {platform.machine()}")
    yield told("Python", f"{version}, {sys.executable}")
    memory = _memory()
    if memory is not None:
        small = memory < LEAST_MEMORY
        remedy = "take smaller images or networks (--image-size, --batch-size)" if small else None
        yield told("memory", f"{memory / 1e9:.1f} GB", "note" if small else "ok", remedy)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = free < 64e6
        remedy = "give the container more (docker run --shm-size 1g)" if small else None
        yield told("/dev/shm", f"{free / 1e9:.2f} GB free", "note" if small else "ok", remedy)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _requirements() -> list[tuple[Requirement, str | None]]:
    """What the installed distribution declares: each requirement and the extra it belongs to, or None."""
    found = []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", str(requirement.marker or ""))
        found.append((requirement, extra[1] if extra else None))
    return found


def _packages() -> Iterable[Finding]:
    for requirement, extra in _requirements():
        if extra is None:
            trouble = _trouble(requirement)
            yield Finding(
                group="Packages",
                name=requirement.name,
                verdict="missing" if trouble else "ok",
                told=trouble or metadata.version(requirement.name),
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
    """What is used only where it is asked for."""
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
            yield Finding(group="Extras", name=package, verdict="ok", told=metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(
                group="Extras",
                name=package,
                verdict="note",
                told=f"is not installed; {serves[package]} needs it",
                remedy=f"pip install 'questpress[{extra}]'",
            )


def _devices() -> Iterable[Finding]:
    import torch

    from ...export.runtime import allowed_cores
    from ..runs.device import bf16_pays, choose_device, device_name, free_memory

    def told(name: str, text: str, verdict: Verdict = "ok", remedy: str | None = None) -> Finding:
        return Finding(group="Devices", name=name, verdict=verdict, told=text, remedy=remedy)

    yield told("processor", device_name("cpu"))
    there = os.cpu_count() or 1
    allowed = allowed_cores()
    fewer = f" of {there}, by affinity or the container's quota" if allowed < there else ""
    yield told("threads", f"{allowed}{fewer}")
    device = choose_device(None)
    if device == "cuda":
        for number in range(torch.cuda.device_count()):
            name = f"cuda:{number}"
            yield told(name, f"{device_name(name)}, {free_memory(name) / 1e9:.1f} GB free")
    elif device == "mps":
        yield told("mps", "Apple's GPU, through Metal")
    else:
        yield told("GPU", *_without_gpu())
    yield told("trains on", device + (", in bf16 where that pays" if bf16_pays(device) else ", in fp32"))


def _without_gpu() -> tuple[str, Verdict, str | None]:
    import torch

    if not Path("/proc/driver/nvidia/version").exists():
        return "none that torch can use; training runs on the processor", "ok", None
    if torch.version.cuda is None:
        return (
            "there is an NVIDIA driver, but torch was built without CUDA",
            "note",
            "pip install --force-reinstall torch torchvision",
        )
    return (
        f"there is an NVIDIA driver, but torch (built for CUDA {torch.version.cuda}) finds no GPU",
        "note",
        "run nvidia-smi: it says what is wrong with the driver",
    )


def _int8() -> Iterable[Finding]:
    from ...export.runtime import detect_target, int8_flags

    target = detect_target()
    flags = ", ".join(int8_flags()) or "none of those that matter"
    slow = target == "x86" or (target == "arm64" and "asimddp" not in int8_flags())
    yield Finding(
        group="int8",
        name="instruction sets",
        verdict="note" if slow else "ok",
        told=flags,
        remedy="int8 files run here, but without VNNI or dot products they gain little" if slow else None,
    )
    yield Finding(group="int8", name="--target here", verdict="ok", told=target)


def _folders(cache: Path) -> Iterable[Finding]:
    for name, folder, option in (("cache", cache, "--cache"), ("runs", Path.cwd(), "--out")):
        yield _folder(name, folder, option)


def _folder(name: str, folder: Path, option: str) -> Finding:
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    told = f"{folder}, {free / 1e9:.1f} GB free"
    if not os.access(there, os.W_OK | os.X_OK):
        remedy = f"name another folder with {option}"
        return Finding(
            group="Folders", name=name, verdict="missing", told=f"{folder} cannot be written", remedy=remedy
        )
    if free < LEAST_DISK:
        remedy = f"make room, or name a folder on a larger disk with {option}"
        return Finding(group="Folders", name=name, verdict="note", told=told, remedy=remedy)
    return Finding(group="Folders", name=name, verdict="ok", told=told)


def _hub(open_: Callable[..., object] = urllib.request.urlopen) -> Finding:
    """Whether published weights can be downloaded; a job with weights of its own needs no internet."""
    remedy = "pass a file (--teacher-weights FILE), or copy a Hugging Face cache from a machine that has one"
    try:
        open_(urllib.request.Request(HUB, method="HEAD"), timeout=ANSWERS_WITHIN)
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        return Finding(
            group="Internet",
            name="published weights",
            verdict="note",
            told=f"{HUB} cannot be reached ({reason}); those in the cache can be used",
            remedy=remedy,
        )
    return Finding(group="Internet", name="published weights", verdict="ok", told=f"{HUB} answers")
