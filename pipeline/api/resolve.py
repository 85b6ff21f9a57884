"""Check all options and the data of a run, and choose the defaults that depend on them."""

import re
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from ...export.conversion.onnx_export import MAX_EMBEDDED_BYTES, check_opset
from ...export.errors import ExportError
from ...export.runtime import Size, detect_target, height_width, make_size
from ...models.build import check_activation, check_size, has_batch_norm, is_detector, show_size
from ...models.build import resolve as resolve_name
from ...models.checkpoint import read_checkpoint
from ...models.errors import ModelError
from ...models.initialize import normalize_label
from .. import methods
from ..config import defaults
from ..config.network import NetworkSpec
from ..config.options import Options, get_flag
from ..config.stages import BASELINE
from ..data.dataset import ImageSet, Progress
from ..data.decode import sample_sizes
from ..data.sources import open_data
from ..data.sources.unlabeled import add_unlabeled, check_unlabeled
from ..errors import UsageError
from ..methods.base import Parameters
from ..methods.shapes import check_methods, compute_shapes, count_parameters
from ..runs.cache import Cache
from ..runs.files import DIGITS, check_outside_data
from ..tasks import task_of
from ..training import trackers
from ..training.weights import check_weights_file, starts_from_scratch
from .options import check_optimizer, choose_method, default_size, fill_digits

MAX_STRETCH = 1.1
"""Largest difference in shape between the student's input and the teacher's."""

QAT_EPOCHS = 0.1
"""Default of --qat-epochs over --epochs."""

QAT_LR = 0.1
"""Default of --qat-lr over --lr."""


def resolve(options: Options, progress: Progress | None = None) -> tuple[Options, ImageSet]:
    """Return the options with all defaults chosen, and the data, whose images are hashed and compared.

    No weights are downloaded. Networks are built on the meta device, for their shapes, except a student that
    a method widens.

    Raises:
        UsageError: an option or the data folder is wrong.
        UnknownModel: a network does not exist.
    """
    chosen = options.model_copy(deep=True)
    _repeat_teacher(chosen)
    if chosen.data == DIGITS:
        fill_digits(chosen)
    _check_lists(chosen)
    _check_networks(chosen)
    if chosen.method == "auto":
        chosen.method = choose_method(chosen)
    _check_rounds(chosen)
    _check_unused(chosen)
    trackers.check_trackers(chosen)
    parameters = methods.parse_parameters(methods.parse_methods(chosen.method), chosen.settings)
    # Do not rescale weights set by the user.
    has_set_weight = chosen.recipe is not None or any(
        name in chosen.weight
        or any(f"{name}.{weight}" in chosen.settings for weight in methods.load(name).weights)
        for name in parameters
    )
    _check_weights_of_losses(chosen, list(parameters))
    for images_folder in (chosen.data, chosen.unlabeled or chosen.data):
        check_outside_data(images_folder, {"--cache": chosen.cache})
    reading: dict[str, Any] = {
        "follow_links": chosen.follow_links,
        "cache": None if chosen.dry_run else Cache(chosen.cache),
        "progress": progress,
    }
    data = open_data(
        chosen.data,
        data_dir=chosen.data_dir,
        download=chosen.download,
        val_fraction=chosen.val_fraction,
        with_boxes=is_detector(chosen.student),
        **reading,
    )
    methods.check_task(parameters, data.task)
    if chosen.unlabeled is not None:
        methods.check_unlabeled(parameters, data.task)
        data = add_unlabeled(data, chosen.unlabeled, **reading)
        chosen.unlabeled_ratio = chosen.unlabeled_ratio or 1.0
    default_balance = "off" if has_set_weight else task_of(data).default_balance
    chosen.balance = chosen.balance or (default_balance if parameters else "off")
    if (reason := task_of(data).needs_label_loss) and chosen.weight.get("ce") == 0:
        raise UsageError(f"--weight ce=0 does not support {data.task}: {reason}. Set it above 0.")
    for name, reason in task_of(data).unsupported.items():
        if getattr(chosen, name):
            raise UsageError(f"{get_flag(name)} does not support {data.task}: {reason}. Remove it.")
    if chosen.calibrate and not data.val:
        raise UsageError("--calibrate requires validation images. Set --val-fraction, for example to 0.1.")
    assert chosen.image_size is not None
    count = count_parameters(chosen.student, len(data.classes), chosen.student_size or chosen.image_size)
    if 4 * count > MAX_EMBEDDED_BYTES:
        raise UsageError(
            f"--student {chosen.student} has {count / 1e6:,.1f} million parameters, too many for an ONNX "
            "file of 2 GB. Use a smaller one."
        )
    classes, images = len(data.classes), len(data.learned)
    check = partial(check_methods, parameters, student=chosen.student, classes=classes, images=images)
    check(
        teachers=chosen.teacher,
        heads=chosen.teacher_head,
        image_size=chosen.image_size,
        student_size=chosen.student_size,
    )
    if chosen.rounds > 1:  # a student is the next one's teacher
        check(teachers=[chosen.student], image_size=chosen.student_size or chosen.image_size)
    _choose(chosen, data)
    assert chosen.epochs is not None
    _choose_cache_views(chosen, parameters, classes, images)
    chosen.settings = {
        f"{method}.{key}": value
        for method, values in parameters.items()
        for key, value in values.for_epochs(chosen.epochs).model_dump(mode="json").items()
    }
    if chosen.out is None:
        seeds = chosen.teachers_from_seeds
        teachers = [f"{chosen.teacher[0]}x{seeds}"] if seeds > 1 else chosen.teacher
        chosen.out = Path("runs") / re.sub("[/:]", "-", "-".join([*teachers, chosen.student, data.name]))
    return chosen, data


def _check_networks(chosen: Options) -> None:
    """Check names, weights files, image sizes and the activation."""
    for name in chosen.teacher:
        resolve_name(name)
    resolve_name(chosen.student)
    for name in chosen.teacher:
        if is_detector(name) != is_detector(chosen.student):
            raise UsageError(
                f"--teacher {name} and --student {chosen.student}: one is a detector, the other is not. Use "
                "detectors for both, or for none."
            )
    for source in chosen.teacher_weights:
        check_weights_file(source, "teacher")
    check_weights_file(chosen.student_weights, "student")
    _check_labels(chosen)
    if chosen.image_size is None:
        chosen.image_size = default_size(chosen.data, chosen.student, chosen.teacher)
    if chosen.student_size is not None:
        _check_student_size(chosen.student_size, chosen.image_size)
    if chosen.student_size == chosen.image_size:
        chosen.student_size = None  # the same run as without the option
    for name in chosen.teacher:
        check_size(name, chosen.image_size)
    check_size(chosen.student, chosen.student_size or chosen.image_size)
    try:
        check_activation(chosen.student, chosen.activation)
    except ModelError as error:
        raise UsageError(str(error)) from error


def _check_student_size(size: Size, image_size: Size) -> None:
    """Raise UsageError unless a student can see the teacher's crops scaled down to ``size``."""
    (height, width), (tall, wide) = height_width(size), height_width(image_size)
    text = f"--student-size {show_size(size)} %s the teacher's --image-size {show_size(image_size)}. " + (
        "The student sees the teacher's crops scaled down: use %s --image-size."
    )
    if height > tall or width > wide:
        raise UsageError(text % ("is larger than", "a smaller one, or a larger"))
    if max(height * wide, width * tall) > MAX_STRETCH * min(height * wide, width * tall):
        scale = max(height / tall, width / wide)
        fitting = make_size(round(tall * scale), round(wide * scale))
        raise UsageError(text % ("has another shape than", f"{show_size(fitting)}, or another"))


def _choose(chosen: Options, data: ImageSet) -> None:
    images = len(data.train)
    teacher_scratch = "none" in chosen.teacher_weights
    # A student without published weights is trained from scratch; a teacher only with --teacher-weights none.
    scratch = starts_from_scratch(chosen)
    chosen.val_fraction = 0.1 if chosen.val_fraction is None else chosen.val_fraction
    optimizer = chosen.optimizer = "adamw" if chosen.optimizer is None else chosen.optimizer
    check_optimizer(optimizer)
    detector = task_of(data).has_boxes
    batch = min(chosen.batch_size or defaults.choose_batch_size(images, detector=detector), images)
    chosen.batch_size = batch

    def rate(role: str, names: Sequence[str], *, scratch: bool) -> float:
        with_norm = all(map(has_batch_norm, names))
        return defaults.choose_learning_rate(
            batch, optimizer, role, scratch=scratch, has_batch_norm=with_norm, detector=detector
        )

    epochs = partial(defaults.choose_epochs, images=images, batch=batch, detector=detector)
    chosen.epochs = chosen.epochs or epochs("student", scratch=scratch)
    chosen.teacher_epochs = chosen.teacher_epochs or epochs("teacher", scratch=teacher_scratch)
    chosen.lr = chosen.lr or rate("student", [chosen.student], scratch=scratch)
    chosen.teacher_lr = chosen.teacher_lr or rate("teacher", chosen.teacher, scratch=teacher_scratch)
    chosen.schedule = chosen.schedule or ("multistep" if chosen.milestones else "cosine")
    if chosen.schedule == "multistep" and not chosen.milestones:
        raise UsageError("--schedule multistep requires --milestones, such as 150,180,210.")
    if chosen.milestones and chosen.schedule != "multistep":
        raise UsageError(f"--milestones requires --schedule multistep, got {chosen.schedule}.")
    _check_averages(chosen)
    chosen.warmup_epochs = _warmup("", chosen.warmup_epochs, chosen.epochs, chosen.recipe)
    chosen.teacher_warmup_epochs = _warmup(
        "teacher-", chosen.teacher_warmup_epochs, chosen.teacher_epochs, chosen.recipe
    )
    chosen.weight_decay = 0.05 if chosen.weight_decay is None else chosen.weight_decay
    chosen.label_smoothing = chosen.label_smoothing or 0.0
    _choose_export(chosen)
    _choose_views(chosen, data)


def _check_rounds(chosen: Options) -> None:
    if chosen.rounds == 1:
        return
    if chosen.method == "none":
        raise UsageError(f"--rounds {chosen.rounds} requires a distillation method, got --method none.")
    if len(chosen.teacher) > 1:
        advice = "set --teachers-from-seeds 1" if chosen.teachers_from_seeds > 1 else "name one --teacher"
        raise UsageError(
            f"--rounds {chosen.rounds} requires one teacher, got {len(chosen.teacher)} teachers. Remove "
            f"--rounds, or {advice}."
        )


def _check_unused(chosen: Options) -> None:
    if chosen.until in ("qat", BASELINE) and not getattr(chosen, chosen.until):
        flag = f"--{chosen.until}"
        raise UsageError(f"--until {chosen.until} requires {flag}. Add {flag} or stop after another stage.")
    names = methods.parse_methods(chosen.method)
    if not names:
        for name in ("cache_views", "balance", "unlabeled", "baseline"):
            if (value := getattr(chosen, name)) not in (None, 0, "off"):
                shown = "" if value is True else f" {value}"
                raise UsageError(f"{get_flag(name)}{shown} has no effect with --method none. Remove it.")
    if chosen.unlabeled is not None:
        chosen.unlabeled = chosen.unlabeled.expanduser()
        check_unlabeled(chosen.unlabeled, chosen.data)
    elif chosen.unlabeled_ratio is not None:
        raise UsageError(f"--unlabeled-ratio {chosen.unlabeled_ratio:g} requires --unlabeled. Remove it.")
    if chosen.cache_top is None:
        return
    if "quest" not in names:
        raise UsageError(f"--cache-top {chosen.cache_top} requires --method quest, got {chosen.method}.")
    if chosen.cache_views == 0:
        raise UsageError(f"--cache-top {chosen.cache_top} has no effect with --cache-views 0.")
    top = str(chosen.settings.setdefault("quest.top", chosen.cache_top))
    if top != str(chosen.cache_top):
        raise UsageError(
            f"--cache-top {chosen.cache_top} contradicts --set quest.top={top}. Remove one of them."
        )


def _choose_cache_views(
    chosen: Options, parameters: Mapping[str, Parameters], classes: int, images: int
) -> None:
    if not parameters:
        chosen.cache_views = 0
    if chosen.cache_views is not None:
        return
    assert chosen.image_size is not None and chosen.epochs is not None
    size = chosen.image_size
    student = compute_shapes(chosen.student, classes, chosen.student_size or size)
    bytes_per_image = sum(
        methods.load(name).cached_bytes(
            values, student, compute_shapes(teacher, 0 if head == "none" else classes, size)
        )
        for name, values in parameters.items()
        for teacher, head in zip(chosen.teacher, chosen.teacher_head, strict=True)
    )
    if chosen.rounds > 1:  # the student is a teacher too
        sizes = [methods.load(name).cached_bytes(p, student, student) for name, p in parameters.items()]
        bytes_per_image = max(bytes_per_image, sum(sizes))
    # Papers draw new views in every epoch.
    most = defaults.DIGITS_VIEWS if chosen.data == DIGITS else defaults.CACHE_VIEWS
    views = defaults.choose_cache_views(chosen.epochs, images * bytes_per_image, most)
    chosen.cache_views = 0 if chosen.recipe else views


def _check_averages(chosen: Options) -> None:
    if chosen.ema is not None and chosen.average_last is not None:
        raise UsageError("--ema and --average-last cannot be used together.")
    assert chosen.epochs is not None
    if chosen.average_last is not None and chosen.average_last > chosen.epochs:
        raise UsageError(
            f"--average-last {chosen.average_last} is larger than --epochs {chosen.epochs}. Use fewer epochs."
        )


def _warmup(prefix: str, warmup_epochs: float | None, epochs: int, recipe: str | None) -> float:
    if warmup_epochs is None:
        return defaults.choose_warmup_epochs(epochs)
    if warmup_epochs >= epochs:
        source = f" of --recipe {recipe}" if recipe else ""
        raise UsageError(
            f"--{prefix}warmup-epochs {warmup_epochs:g}{source} must be smaller than "
            f"--{prefix}epochs {epochs}."
        )
    return warmup_epochs


def _choose_views(chosen: Options, data: ImageSet) -> None:
    assert chosen.image_size is not None
    side = min(height_width(chosen.image_size))
    if chosen.crop is None:
        short_sides = [min(size) for size in sample_sizes(data.train)]
        is_small = bool(short_sides) and round(statistics.median(short_sides)) <= defaults.SMALL_IMAGES
        chosen.crop = "pad" if is_small else "resized"
    for name, crop in (("crop_scale", "resized"), ("pad", "pad"), ("pad_mode", "pad")):
        if getattr(chosen, name) is not None and chosen.crop != crop:
            raise UsageError(f"{get_flag(name)} requires --crop {crop}, got --crop {chosen.crop}.")
    if chosen.crop == "resized":
        chosen.crop_scale = 0.25 if chosen.crop_scale is None else chosen.crop_scale
    elif chosen.crop == "pad":
        if chosen.pad is None:
            spec = NetworkSpec(chosen.student, chosen.image_size, 0, "", resize=chosen.resize)
            chosen.pad = defaults.compute_pad(side, min(height_width(spec.preprocessing.resize)))
        chosen.pad_mode = chosen.pad_mode or "zeros"
        if chosen.pad >= side:
            raise UsageError(f"--pad {chosen.pad} must be smaller than the image size {side}.")
    chosen.flip = True if chosen.flip is None else chosen.flip
    chosen.color_jitter = chosen.color_jitter or 0.0
    if chosen.recipe is None:
        chosen.randaugment = chosen.randaugment or None  # the same run as without the option


def _check_lists(chosen: Options) -> None:
    for name in ("teacher_weights", "teacher_head"):
        values = getattr(chosen, name)
        if len(values) == 1:
            setattr(chosen, name, values * len(chosen.teacher))
        elif len(values) != len(chosen.teacher):
            raise UsageError(
                f"{get_flag(name)} is given {len(values)} times for {len(chosen.teacher)} teachers. "
                "Repeat it for each --teacher in the same order."
            )
    for source, head in zip(chosen.teacher_weights, chosen.teacher_head, strict=True):
        if source == "none" and head in ("none", "keep"):
            origin = ", the default for the digits" if chosen.data == DIGITS else ""
            raise UsageError(
                f"--teacher-head {head} requires a trained teacher, got --teacher-weights none{origin}. Set "
                "--teacher-weights to a file."
            )


def _check_weights_of_losses(chosen: Options, methods: list[str]) -> None:
    for name, value in chosen.weight.items():
        if name not in [*methods, "ce"]:
            raise UsageError(
                f"--weight {name}={value:g}: unknown loss. The losses are {', '.join([*methods, 'ce'])}."
            )
        if value < 0:
            raise UsageError(f"--weight {name}={value:g}: a weight must not be negative.")
    if chosen.weight.get("ce", 1) == 0 and not any(chosen.weight.get(name, 1) for name in methods):
        raise UsageError("--weight: all losses have weight 0. Set one of them above 0.")


def _choose_export(chosen: Options) -> None:
    """Choose the options of export; ``epochs`` and ``lr`` are chosen already."""
    try:
        check_opset(chosen.opset)
    except ExportError as error:
        raise UsageError(f"--opset {chosen.opset}: {error}") from error
    chosen.target = chosen.target or [detect_target()]  # type: ignore[list-item]
    for target in chosen.target:
        if chosen.target.count(target) > 1:
            raise UsageError(f"--target {target} is given twice. Remove one of them.")
    if not chosen.qat:
        for name in ("qat_epochs", "qat_lr"):
            if getattr(chosen, name) is not None:
                raise UsageError(f"{get_flag(name)} requires --qat. Add --qat or remove it.")
        return
    assert chosen.epochs and chosen.lr
    chosen.qat_epochs = chosen.qat_epochs or max(1, round(chosen.epochs * QAT_EPOCHS))
    chosen.qat_lr = chosen.qat_lr or QAT_LR * chosen.lr


def _repeat_teacher(options: Options) -> None:
    """Repeat the teacher for ``--teachers-from-seeds``; a resolved list is unchanged."""
    count = options.teachers_from_seeds
    if count == 1:
        return
    if len(set(options.teacher)) > 1 or len(options.teacher) not in (1, count):
        raise UsageError(
            f"--teachers-from-seeds {count} requires one --teacher, got {len(options.teacher)}. Name one, or "
            "set --teachers-from-seeds 1."
        )
    for head in options.teacher_head:
        if head in ("keep", "none"):
            raise UsageError(
                f"--teachers-from-seeds {count}: with --teacher-head {head} no teacher is trained, so all "
                f"{count} would be the same. Set --teacher-head replace or --teachers-from-seeds 1."
            )
    options.teacher = options.teacher[:1] * count


def _check_labels(options: Options) -> None:
    """Check that all weights files whose heads may be kept have the same classes."""
    if len(set(options.teacher_weights)) == 1:
        return
    labels_of: dict[str, tuple[str, ...]] = {}
    for source, head in zip(options.teacher_weights, options.teacher_head, strict=True):
        if source not in ("auto", "none", *labels_of) and head in ("auto", "keep"):
            labels = read_checkpoint(Path(source)).label_names
            if labels is not None:
                labels_of[source] = labels
    for (first, labels), (second, others) in combinations(labels_of.items(), 2):
        if [normalize_label(label) for label in labels] != [normalize_label(label) for label in others]:
            raise UsageError(
                f"The teachers have different classes, or the same in another order: {first} has "
                f"{_brief(labels)}, {second} has {_brief(others)}. Set --teacher-head for each --teacher, to "
                "replace for those to fine-tune."
            )


def _brief(classes: Sequence[str]) -> str:
    first = ", ".join(classes[:3])
    return first if len(classes) <= 3 else f"{first} … ({len(classes)} classes)"
