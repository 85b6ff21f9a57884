"""Merge a recipe, a config file and the options given by the user into ``Options``."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ...models.build import check_size, default_image_size, is_detector
from ...models.errors import ModelError
from .. import methods
from ..config import defaults, recipes
from ..config.limits import read_yaml
from ..config.options import Options, get_flag, parse_pairs
from ..errors import UsageError
from ..methods.shapes import check_methods
from ..runs.files import DIGITS, data_text
from ..training.weights import starts_from_scratch

EXAMPLES = {"teacher": "resnet50", "student": "mobilenetv2"}

COMMAND_LINE_ONLY = ("config", "json", "json_")

DEPENDENT_OPTIONS = {
    "optimizer": ("lr", "teacher_lr", "qat_lr"),  # SGD's learning rates are much larger than AdamW's
    "qat": ("qat_epochs", "qat_lr"),
    "data": ("data_dir", "download", "follow_links"),
    "unlabeled": ("unlabeled_ratio",),
    "crop": ("crop_scale", "pad", "pad_mode"),
    "schedule": ("milestones",),
    "weight": ("balance",),  # its default depends on whether a weight is set
    "method": ("cache_views", "cache_top", "balance"),
}
"""Options of a config or recipe that are dropped when the user changes the option they depend on."""


def read_options(given: Mapping[str, Any]) -> Options:
    """Return the options of a recipe and a config file, if they are named, overridden by ``given``.

    Raises:
        UsageError: an option is unknown, missing or of the wrong type.
    """
    merged = merge_config(given)
    if isinstance(merged.get("data"), Path):
        merged["data"] = data_text(merged["data"])
    # A pydantic field cannot be called json; its alias can.
    if "json_" in merged:
        merged["json"] = merged.pop("json_")
    names = {field.alias or name for name, field in Options.model_fields.items()}
    for name in merged:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            raise UsageError(
                f"Unknown option '{name}'.{f' Did you mean {near[0]}?' if near else ''} "
                "See compress run --help."
            )
    for name, example in EXAMPLES.items():
        if not merged.get(name):
            raise UsageError(f"--{name} is missing. Set it to a timm model, such as --{name} {example}.")
    if merged.get("recipe"):
        teachers = [merged["teacher"]] if isinstance(merged["teacher"], str) else merged["teacher"]
        recipe = recipes.load_recipe(str(merged["recipe"])).for_pair(teachers, merged["student"])
        merged = merge_options(recipe, merged)
    try:
        return Options.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        field, *keys = first["loc"]
        option = " ".join([get_flag(str(field)), *(key for key in keys if isinstance(key, str))])
        reason = re.sub(r"^\w+ should", "must", first["msg"].removeprefix("Value error, "))
        value = first["input"]
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        raise UsageError(f"{option} {reason}, got {shown}.") from error


def choose_method(chosen: Options) -> str:
    """Return the method of ``--method auto``: the default for these networks that can be used with them."""
    candidates: tuple[str, ...] = ()
    if is_detector(chosen.student):
        candidates = defaults.DETECTION_METHODS
    elif not starts_from_scratch(chosen) and len(chosen.teacher) == 1:
        candidates = (defaults.TUNING_METHOD,)
    named = {key.partition(".")[0] for key in (*chosen.settings, *chosen.weight)} - {"ce"}
    for method in candidates:
        names = methods.parse_methods(method)
        if named <= set(names) and _fit(method, chosen):
            return method
    return defaults.SCRATCH_METHOD


def check_optimizer(name: str) -> None:
    """Raise UsageError with the nearest names unless timm has this optimizer."""
    from timm.optim import list_optimizers

    names = [str(optimizer) for optimizer in list_optimizers()]
    if name not in names:
        near = get_close_matches(name, names, n=3)
        advice = f"The nearest are {', '.join(near)}" if near else "Try adamw or sgd"
        raise UsageError(f"--optimizer {name} does not exist in timm. {advice}.")


def default_size(data: str, student: str, teachers: Sequence[str]) -> int:
    """Return the default side of the networks' input in pixels."""
    if data != DIGITS:
        return default_image_size(student)
    small, larger = defaults.DIGITS_SIZES
    try:
        for name in (student, *teachers):
            check_size(name, small)
    except ModelError:
        return larger
    return small


def fill_digits(chosen: Options) -> None:
    """Fill in the defaults for the built-in digits, which published weights do not help with."""
    chosen.teacher_weights = ["none" if source == "auto" else source for source in chosen.teacher_weights]
    chosen.student_weights = "none" if chosen.student_weights == "auto" else chosen.student_weights
    for name, value in defaults.DIGITS.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)


def _fit(method: str, chosen: Options) -> bool:
    """Return True if the networks have what a method reads, regardless of the data."""
    assert chosen.image_size is not None
    try:
        check_methods(
            methods.parse_parameters(methods.parse_methods(method), {}),
            chosen.teacher,
            chosen.student,
            classes=2,
            image_size=chosen.image_size,
            images=1 << 30,
            student_size=chosen.student_size,
            heads=chosen.teacher_head,
        )
    except (ModelError, UsageError):
        return False
    return True


def merge_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a config file, if it is named, overridden by ``given``."""
    if given.get("config") is None:
        return dict(given)
    return merge_options(_read_config(Path(given["config"])), given)


def merge_options(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` overridden by ``given``; ``settings`` and ``weight`` are merged key by key."""
    changed = [
        name for name in DEPENDENT_OPTIONS if name in given and name in config and given[name] != config[name]
    ]
    dropped = {dependent for name in changed for dependent in DEPENDENT_OPTIONS[name]}
    if any(_is_loss_weight(str(setting).partition("=")[0].strip()) for setting in given.get("settings", ())):
        dropped.add("balance")
    merged = {**{name: value for name, value in config.items() if name not in dropped}, **given}
    method_names = [name.strip() for name in str(given.get("method", "")).split("+")]
    for name in ("settings", "weight"):
        kept, more = config.get(name), given.get(name, {})
        malformed = isinstance(more, list) and not all("=" in str(pair) for pair in more)
        if not isinstance(kept, Mapping) or malformed:
            continue  # rejected by the validation of Options
        if "method" in given:  # settings of other methods do not apply
            kept = {key: value for key, value in kept.items() if key.split(".")[0] in (*method_names, "ce")}
        merged[name] = {**kept, **parse_pairs(more)}
    return merged


def _is_loss_weight(setting: str) -> bool:
    method, _, key = setting.partition(".")
    return method in methods.list_methods() and key in methods.load(method).weights


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} does not contain options. Write one 'name: value' a line.")
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = {"set": "settings"}.get(str(key), str(key).replace("-", "_"))
        if name in options:
            raise UsageError(f"--config {path} contains {name} twice. Remove one of them.")
        if name in COMMAND_LINE_ONLY:
            raise UsageError(f"--config {path}: {name} can only be set on the command line. Remove it.")
        if value is not None:
            options[name] = value
    return options
