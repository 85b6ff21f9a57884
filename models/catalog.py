"""Models to choose from: cost, license, and published weights, which are downloaded or refused in seconds."""

import fnmatch
import hashlib
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .build import (
    ALIASES,
    DETECTORS,
    Size,
    create_network,
    default_image_size,
    find_nearest,
    list_architectures,
    pretrained_cfg,
    resolve,
    split_name,
)
from .checkpoint import Checkpoint, refuse_compressed
from .errors import ModelError, UnknownModel

PROBE_SECONDS = 5.0

GOOD_STUDENTS = ("mobilenetv4_conv_small", "mobilenetv2", "mobilenetv3", "efficientnet_lite0", "resnet18")
"""Students to try first, as in docs/choosing.md."""

# Licenses that let weights be used, changed and shipped by anyone, for any purpose.
FREE_LICENSES = frozenset(
    {
        *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "zlib"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-3.0", "cc-by-sa-4.0", "cc-by-sa-3.0"),
    }
)


def has_pretrained(name: str) -> bool:
    """Return True if timm lists published weights for a name (a detector's backbone); works offline."""
    import timm

    return bool(timm.models.is_model_pretrained(split_name(resolve(name))[1]))


def find_license(name: str) -> str | None:
    """Return the license that timm states for published weights; None if there are none or it is unknown."""
    if not has_pretrained(name):
        return None
    stated = pretrained_cfg(name).license
    return str(stated) if stated and stated != "unknown" else None


def is_free(stated: str | None) -> bool:
    """Return True if a license allows any use; an unknown one does not."""
    return stated is not None and stated.lower() in FREE_LICENSES


class Unavailable(ModelError):
    """Published weights that are not available here.

    Args:
        missing: (name, option of the command, reason) of each.
    """

    def __init__(self, missing: Sequence[tuple[str, str, str]]) -> None:
        self.missing = tuple(missing)
        super().__init__(_describe_missing(missing))


def check_published(wanted: Sequence[tuple[str, str]], *, download: bool = True) -> None:
    """Check that published weights are available.

    Raises Unavailable, which lists all that are not, and ModelError if a name has no published weights.

    Args:
        wanted: (name, option of the command) of each.
        download: download weights that are not cached; otherwise only check that the server has them.
    """
    missing: list[tuple[str, str, str]] = []
    for name, option in dict.fromkeys(wanted):
        _, full = split_name(resolve(name))
        cfg = _published(full, option)
        try:
            _locate(full, cfg, option, download)
        except Unavailable as error:
            missing += error.missing
    if missing:
        raise Unavailable(missing)


def fetch_pretrained(name: str, option: str = "--teacher-weights") -> Checkpoint:
    """Return the published weights of a name (default tag if it has none) from the cache or the internet.

    Those of a detector are its backbone's. Raises ModelError, which names the command-line `option`, within
    seconds if they are not available.
    """
    import timm

    _, full = split_name(resolve(name))
    cfg = _published(full, option)
    located = _locate(full, cfg, option, download=True)
    assert located is not None
    file, source = located
    if file.suffix != ".npz" and zipfile.is_zipfile(file):  # numpy's archives may be compressed
        refuse_compressed(file)
    try:
        with torch.random.fork_rng(devices=[]):
            network = timm.create_model(
                full,
                pretrained=True,
                num_classes=cfg.num_classes,
                pretrained_cfg_overlay={"file": str(file), "custom_load": cfg.custom_load},
            )
    except Exception as error:  # a damaged download fails in many ways
        raise ModelError(
            f"The published weights of {full} cannot be loaded ({type(error).__name__}). Delete {file} "
            "and try again."
        ) from error
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    names, descriptions = _labels(cfg)
    return Checkpoint(
        network.state_dict(),
        names,
        source,
        digest,
        label_descriptions=descriptions,
        license=find_license(full),
    )


def _published(full: str, option: str) -> Any:
    if not has_pretrained(full):
        raise ModelError(
            f"{option}: there are no published weights for {full}. Use {option} FILE, train from scratch by "
            f"{option} none, or choose a model with weights (see `compress models`)."
        )
    return pretrained_cfg(full)


def _locate(full: str, cfg: Any, option: str, download: bool) -> tuple[Path, str] | None:
    """Return the weights file and its source; None if it is not cached and `download` is False."""
    locate = _from_hub if cfg.hf_hub_id else _from_url
    return locate(full, cfg, option, download)


def _from_hub(full: str, cfg: Any, option: str, download: bool) -> tuple[Path, str] | None:
    """Return the weights file in Hugging Face's cache, downloaded if necessary."""
    from huggingface_hub import errors as hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives, hf_split

    repository, revision = hf_split(cfg.hf_hub_id)
    wanted = cfg.hf_hub_filename or HF_WEIGHTS_NAME
    source = f"{repository} on Hugging Face"
    candidates = list(dict.fromkeys([*_get_safe_alternatives(wanted), wanted]))
    for filename in candidates:
        cached = try_to_load_from_cache(repository, filename, revision=revision)
        if isinstance(cached, str):
            return Path(cached), source
    for filename in candidates:
        try:
            # One request without retries: offline, the download would retry for most of a minute.
            get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision), timeout=PROBE_SECONDS)
            if not download:
                return None
            return Path(hf_hub_download(repository, filename, revision=revision)), source
        except hub.EntryNotFoundError as error:
            if isinstance(error, hub.LocalEntryNotFoundError):  # the download failed after the request
                raise Unavailable([(full, option, "huggingface.co cannot be reached")]) from error
        except hub.OfflineModeIsEnabled as error:
            raise Unavailable([(full, option, "HF_HUB_OFFLINE is set")]) from error
        except hub.HfHubHTTPError as error:
            raise Unavailable([(full, option, f"{repository}: {error}")]) from error
        except Exception as error:  # the http library behind the hub differs by version, and so do its errors
            raise Unavailable([(full, option, "huggingface.co cannot be reached")]) from error
    raise Unavailable([(full, option, f"{repository} has no weights file")])


def _from_url(full: str, cfg: Any, option: str, download: bool) -> tuple[Path, str] | None:
    """Return the weights file in torch's cache, downloaded if necessary."""
    from timm.models._hub import check_cached_file, download_cached_file

    if cfg.file:
        return Path(cfg.file), str(cfg.file)
    address = cfg.url if isinstance(cfg.url, str) else cfg.url[0]
    try:
        if not check_cached_file(cfg.url):
            request = urllib.request.Request(address, method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            if not download:
                return None
        return Path(download_cached_file(cfg.url)), address
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        raise Unavailable([(full, option, f"{address} cannot be reached")]) from error


def _describe_missing(missing: Sequence[tuple[str, str, str]]) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    names = " and ".join(dict.fromkeys(full for full, _, _ in missing))
    reasons = "; ".join(dict.fromkeys(reason for _, _, reason in missing))
    options = list(dict.fromkeys(option for _, option, _ in missing))
    return (
        f"The published weights of {names} are not available: {reasons}. Use weights files "
        f"({' '.join(f'{option} FILE' for option in options)}), train from scratch "
        f"({' '.join(f'{option} none' for option in options)}), or run this command once with internet "
        f"access and copy the Hugging Face cache of that machine to {HF_HUB_CACHE} (or set HF_HOME)."
    )


def published_labels(name: str, count: int) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Return class names and descriptions of an architecture's published weights if they have ``count``."""
    cfg = pretrained_cfg(name)
    has_head = has_pretrained(name) and not split_name(resolve(name))[0]
    return _labels(cfg) if has_head and cfg.num_classes == count else (None, None)


def _labels(cfg: Any) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Return class names and descriptions: those of the config, else of the ImageNet subset of this size."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if cfg.label_names:
        names = tuple(cfg.label_names)
        described = cfg.label_descriptions or {}
        return names, tuple(described.get(name, name) for name in names) if described else None
    subset = infer_imagenet_subset({"num_classes": cfg.num_classes})
    if subset is None:
        return None, None
    info = ImageNetInfo(subset)
    return tuple(info.label_names()), tuple(info.label_descriptions())


COCO_CLASSES = 80
"""Number of classes that detectors are listed with."""

MAX_DESCRIBED = 60
"""Models that are built, without memory, to count their parameters and multiply-adds."""


@dataclass(frozen=True)
class Entry:
    """One line of the list."""

    name: str
    alias: str | None
    parameters: int
    """With the classes of the published weights; detectors with those of COCO."""
    gmacs: float | None
    """Billions of multiply-adds for one image; None if they cannot be counted."""
    image_size: Size
    license: str | None
    """License of the published weights."""
    has_weights: bool


def describe(name: str, image_size: Size | None = None) -> Entry:
    """Count parameters and multiply-adds of a model at `image_size` pixels (its default size if None).

    Runs on torch's meta device: shapes only, well under a second. Raises UnknownModel, ModelError.
    """
    full = resolve(name)
    size = image_size or default_image_size(full)
    parameters, gmacs = _cost(full, size)
    return Entry(
        name=full,
        alias=name if name in ALIASES else None,
        parameters=parameters,
        gmacs=gmacs,
        image_size=size,
        license=find_license(full),
        has_weights=has_pretrained(full),
    )


def multiply_adds(name: str, image_size: Size, classes: int) -> float | None:
    """Count billions of multiply-adds for one image; None if they cannot be counted.

    Raises UnknownModel, ModelError.
    """
    return _cost(resolve(name), image_size, classes)[1]


def _cost(full: str, image_size: Size, classes: int | None = None) -> tuple[int, float | None]:
    from timm.layers import to_2tuple
    from torch.utils.flop_counter import FlopCounterMode

    if classes is None:
        classes = COCO_CLASSES if split_name(full)[0] else int(pretrained_cfg(full).num_classes)
    with torch.device("meta"):
        network = create_network(full, classes, image_size).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            network(torch.empty(1, 3, *to_2tuple(image_size), device="meta"))
    except Exception:  # the operations of a few networks have no shapes-only form, or they refuse this size
        return parameters, None
    return parameters, counter.get_total_flops() / 2 / 1e9


def find_matching(pattern: str = "*") -> list[str]:
    """Return names and aliases that match a shell pattern (`mobilenet*`); a plain word matches anywhere.

    A pattern after a kind of detector matches backbones: `retinanet:mobilenet*`.
    """
    from timm.models._registry import _natural_key

    pattern = pattern.strip().lower() or "*"
    kind, _, backbones = pattern.rpartition(":")
    if kind.partition("@")[0] in DETECTORS:
        return [f"{kind}:{name}" for name in find_matching(backbones)]
    if not re.search(r"[*?\[]", pattern):
        pattern = f"*{pattern}*"
    names = {*list_architectures(), *ALIASES}
    return sorted((name for name in names if fnmatch.fnmatchcase(name.lower(), pattern)), key=_natural_key)


def list_models(pattern: str = "*", image_size: Size | None = None) -> dict[str, Entry | str | None]:
    """Describe the models whose name matches `pattern`.

    Returns each name with its description, the reason that it has none, or None if more than `MAX_DESCRIBED`
    models match. Raises UnknownModel if no model matches.
    """
    names = find_matching(pattern)
    if not names:
        near = find_nearest(pattern.strip("*?"))
        advice = f" The nearest are {', '.join(near)}." if near else ""
        raise UnknownModel(f"No model matches '{pattern}'.{advice}")
    if len(names) > MAX_DESCRIBED:
        return dict.fromkeys(names)
    entries: dict[str, Entry | str | None] = {}
    for name in names:
        try:
            entries[name] = describe(name, image_size)
        except ModelError as error:
            entries[name] = str(error)
    return entries
