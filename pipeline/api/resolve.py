"""Stage 0: every name, option and data folder is checked, and what the user left open is chosen."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from ...export.conversion.onnx_export import check_opset
from ...export.errors import ExportError
from ...export.runtime import detect_target
from ...models.build import check_activation, check_size, default_image_size, geometry
from ...models.checkpoint import read_checkpoint
from ...models.errors import ModelError
from ...models.initialize import plain
from ...models.names import resolve as resolve_name
from ...models.pretrained import has_pretrained
from .. import methods
from ..config import defaults, stages
from ..config.options import Options
from ..data.dataset import ImageSet
from ..data.decode import sample_sizes
from ..data.sources import open_data
from ..errors import UsageError
from ..methods.base import Parameters
from ..methods.shapes import check_methods, compute_shapes
from ..methods.shapes import count_parameters as parameters_of
from ..tasks import task_of
from ..training.monitoring import trackers

QAT_SHARE = 10
"""--epochs over --qat-epochs, unless it is said."""

QAT_LR = 0.1
"""--qat-lr over --lr, unless it is said."""


def complete(chosen: Options) -> None:
    """Choose what was left open; ``epochs`` and ``lr`` are chosen already.

    Raises:
        UsageError: a target is named twice, there is no such opset, or an option belongs to --qat, which was
            not asked for.
    """
    try:
        check_opset(chosen.opset)
    except ExportError as error:
        raise UsageError(f"--opset {chosen.opset}: {error}.") from error
    # Checked again when it is assigned.
    chosen.target = chosen.target or [detect_target()]  # type: ignore[list-item]
    twice = next((name for name in chosen.target if chosen.target.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--target {twice} is given twice; name each target once.")
    if not chosen.qat:
        for name in ("qat_epochs", "qat_lr"):
            if getattr(chosen, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is a part of --qat, which was not asked for: say --qat, too.")
        if chosen.until == "qat":
            raise UsageError("--until qat: there is no such stage without --qat; say it, too.")
        return
    assert chosen.epochs and chosen.lr
    chosen.qat_epochs = chosen.qat_epochs or max(1, round(chosen.epochs / QAT_SHARE))
    chosen.qat_lr = chosen.qat_lr or QAT_LR * chosen.lr


FITTING = ("auto", "keep")
"""Ways to treat a head that may leave it as it is."""


def from_seeds(options: Options) -> None:
    """Name the one teacher as often as ``--teachers-from-seeds`` says; a resolved list stays as it is.

    Raises:
        UsageError: there are several already, or they would be one network.
    """
    count = options.teachers_from_seeds
    if count == 1:
        return
    if len(set(options.teacher)) > 1 or len(options.teacher) not in (1, count):
        raise UsageError(
            f"--teachers-from-seeds {count} is about one architecture, and --teacher is given "
            f"{len(options.teacher)} times; name one, or say --teachers-from-seeds 1."
        )
    for head in options.teacher_head:
        if head in ("keep", "none"):
            raise UsageError(
                f"--teachers-from-seeds {count}: with --teacher-head {head} no teacher is trained, and all "
                f"{count} would be the same network; say --teacher-head replace, or --teachers-from-seeds 1."
            )
    options.teacher = options.teacher[:1] * count


def check_labels(options: Options) -> None:
    """
    Raises:
        UsageError: two weights files say that their heads are for different classes.
    """
    if len(set(options.teacher_weights)) == 1:
        return
    known: dict[str, tuple[str, ...]] = {}
    for source, head in zip(options.teacher_weights, options.teacher_head, strict=True):
        if source not in ("auto", "none", *known) and head in FITTING:
            labels = read_checkpoint(Path(source)).label_names
            if labels is not None:
                known[source] = labels
    for (one, classes), (other, others) in combinations(known.items(), 2):
        if [plain(label) for label in classes] != [plain(label) for label in others]:
            raise UsageError(
                "The teachers are for different classes or have them in another order: "
                f"{one} has {_brief(classes)}, {other} has {_brief(others)}; say --teacher-head for each "
                "--teacher, and replace for one that is to be tuned to the data."
            )


def _brief(classes: Sequence[str]) -> str:
    first = ", ".join(classes[:3])
    return first if len(classes) <= 3 else f"{first} … ({len(classes)} classes)"


DIGITS = "digits"


def resolve(options: Options) -> tuple[Options, ImageSet]:
    """The options with every choice made, and the data they were made for.

    No weights are fetched and no network is built (shapes alone are tried, without memory).

    Raises:
        UsageError, UnknownModel: an option, a name or the data folder is wrong.
    """
    chosen = options.model_copy(deep=True)
    from_seeds(chosen)
    _check_lists(chosen)
    stages.check_rounds(chosen)
    _check_store(chosen)
    trackers.check_trackers(chosen)
    parameters = methods.parse_parameters(methods.parse_methods(chosen.method), chosen.settings)
    # A weight that was asked for is not to be second-guessed.
    asked_for = chosen.recipe is not None or any(
        name in chosen.weight
        or any(f"{name}.{weight}" in chosen.settings for weight in methods.load(name).weights)
        for name in parameters
    )
    _check_weights_of_losses(chosen, list(parameters))
    for name in chosen.teacher:
        resolve_name(name)
    resolve_name(chosen.student)
    for source in chosen.teacher_weights:
        _check_weights_file(source, "teacher")
    _check_weights_file(chosen.student_weights, "student")
    check_labels(chosen)
    if chosen.image_size is None:
        chosen.image_size = default_size(chosen.data, chosen.student)
    if chosen.student_size is not None and chosen.student_size > chosen.image_size:
        raise UsageError(
            f"--student-size {chosen.student_size} is larger than the teacher's --image-size "
            f"{chosen.image_size}: the student sees the teacher's crops scaled down; take a smaller one, or "
            "a larger --image-size."
        )
    if chosen.student_size == chosen.image_size:
        chosen.student_size = None  # said or not, it is the same run
    for name in chosen.teacher:
        check_size(name, chosen.image_size)
    check_size(chosen.student, chosen.student_size or chosen.image_size)
    try:
        check_activation(chosen.student, chosen.activation)
    except ModelError as error:
        raise UsageError(f"--activation {chosen.activation}: {error}") from error
    data = open_data(
        chosen.data,
        data_dir=chosen.data_dir,
        download=chosen.download,
        val_fraction=chosen.val_fraction,
    )
    methods.check_task(parameters, data.task)
    silent = "off" if asked_for else task_of(data).default_balance
    chosen.balance = "off" if not parameters else chosen.balance or silent
    if chosen.calibrate and not data.val:
        raise UsageError(
            "--calibrate fits a temperature on val images, and this data has none: hold some out, as with "
            "--val-fraction 0.1."
        )
    _check_ships(chosen, len(data.classes))
    check_methods(
        parameters,
        chosen.teacher,
        chosen.student,
        heads=chosen.teacher_head,
        classes=len(data.classes),
        image_size=chosen.image_size,
        student_size=chosen.student_size,
        images=len(data.train),
    )
    if chosen.rounds > 1:  # a student is the next one's teacher
        check_methods(
            parameters,
            [chosen.student],
            chosen.student,
            classes=len(data.classes),
            image_size=chosen.student_size or chosen.image_size,
            images=len(data.train),
        )
    _choose(chosen, data)
    assert chosen.epochs is not None
    _choose_store(chosen, parameters, len(data.classes), len(data.train))
    chosen.settings = {
        f"{method}.{key}": value
        for method, of_method in parameters.items()
        for key, value in of_method.for_epochs(chosen.epochs).model_dump(mode="json").items()
    }
    if chosen.out is None:
        seeds = chosen.teachers_from_seeds
        teachers = [f"{chosen.teacher[0]}x{seeds}"] if seeds > 1 else chosen.teacher
        chosen.out = Path("runs") / "-".join([*teachers, chosen.student, data.name]).replace("/", "-")
    return chosen, data


def _check_ships(chosen: Options, classes: int) -> None:
    """
    Raises:
        UsageError: the student is larger than a file that ships.
    """
    from ...export.conversion.onnx_export import MAX_EMBEDDED_BYTES

    assert chosen.image_size is not None
    count = parameters_of(chosen.student, classes, chosen.student_size or chosen.image_size)
    if 4 * count > MAX_EMBEDDED_BYTES:
        raise UsageError(
            f"--student {chosen.student} has {count / 1e6:,.1f} million parameters, more than an ONNX file "
            "of 2 GB holds; take a smaller one."
        )


def default_size(data: str, student: str) -> int:
    """Return the default side of the networks' input in pixels."""
    return 64 if data == DIGITS else default_image_size(student)


def _start(source: str, data: str) -> str:
    """``auto`` is ``none`` for the built-in digits: no network was ever trained on anything like them."""
    return "none" if source == "auto" and data == DIGITS else source


def _choose(chosen: Options, data: ImageSet) -> None:
    images = len(data.train)
    chosen.teacher_weights = [_start(source, chosen.data) for source in chosen.teacher_weights]
    chosen.student_weights = _start(chosen.student_weights, chosen.data)
    teacher_scratch = "none" in chosen.teacher_weights
    # An architecture without published weights starts from scratch; a teacher never does so unasked.
    scratch = chosen.student_weights == "none" or (
        chosen.student_weights == "auto" and not has_pretrained(chosen.student)
    )
    chosen.val_fraction = 0.1 if chosen.val_fraction is None else chosen.val_fraction
    chosen.optimizer = "adamw" if chosen.optimizer is None else chosen.optimizer
    _check_optimizer(chosen.optimizer)
    # A batch is no more than there is, and its learning rate that of what it is.
    batch = chosen.batch_size = min(chosen.batch_size or defaults.choose_batch_size(images), images)
    chosen.epochs = chosen.epochs or defaults.choose_epochs("student", images, scratch=scratch)
    chosen.teacher_epochs = chosen.teacher_epochs or defaults.choose_epochs(
        "teacher", images, scratch=teacher_scratch
    )
    chosen.lr = chosen.lr or defaults.choose_learning_rate(
        "student", batch, scratch=scratch, optimizer=chosen.optimizer
    )
    chosen.teacher_lr = chosen.teacher_lr or defaults.choose_learning_rate(
        "teacher", batch, scratch=teacher_scratch, optimizer=chosen.optimizer
    )
    chosen.schedule = chosen.schedule or ("multistep" if chosen.milestones else "cosine")
    _check_schedule(chosen)
    _check_averages(chosen)
    chosen.warmup_epochs = _warmup("", chosen.warmup_epochs, chosen.epochs, chosen.recipe)
    chosen.teacher_warmup_epochs = _warmup(
        "teacher-", chosen.teacher_warmup_epochs, chosen.teacher_epochs, chosen.recipe
    )
    chosen.weight_decay = 0.05 if chosen.weight_decay is None else chosen.weight_decay
    chosen.label_smoothing = chosen.label_smoothing or 0.0
    complete(chosen)
    _choose_views(chosen, data)


def _check_store(chosen: Options) -> None:
    names = methods.parse_methods(chosen.method)
    if not names and chosen.cache_views:
        raise UsageError(f"--cache-views {chosen.cache_views}: with --method none no teacher is asked.")
    if chosen.cache_top is None:
        return
    if "quest" not in names:
        raise UsageError(
            f"--cache-top {chosen.cache_top} is about QuEST's words, and --method is {chosen.method}."
        )
    if chosen.cache_views == 0:
        raise UsageError(f"--cache-top {chosen.cache_top} has no effect with --cache-views 0.")
    top = str(chosen.settings.setdefault("quest.top", chosen.cache_top))
    if top != str(chosen.cache_top):
        raise UsageError(
            f"--cache-top {chosen.cache_top} and --set quest.top={top} contradict each other; take one."
        )


def _choose_store(chosen: Options, parameters: Mapping[str, Parameters], classes: int, images: int) -> None:
    if not parameters:
        chosen.cache_views = 0
    if chosen.cache_views is not None:
        return
    assert chosen.image_size is not None and chosen.epochs is not None
    size = chosen.image_size
    student = compute_shapes(chosen.student, classes, chosen.student_size or size)
    bytes_per_image = sum(
        methods.load(name).cached_bytes(
            of_method, student, compute_shapes(teacher, 0 if head == "none" else classes, size)
        )
        for name, of_method in parameters.items()
        for teacher, head in zip(chosen.teacher, chosen.teacher_head, strict=True)
    )
    if chosen.rounds > 1:  # a round's answers are as large as its teacher's maps
        as_teacher = sum(
            methods.load(name).cached_bytes(p, student, student) for name, p in parameters.items()
        )
        bytes_per_image = max(bytes_per_image, as_teacher)
    # A recipe is followed to the letter: a new view each epoch.
    chosen.cache_views = (
        0 if chosen.recipe else defaults.choose_cache_views(chosen.epochs, images * bytes_per_image)
    )


def _check_averages(chosen: Options) -> None:
    if chosen.ema is not None and chosen.average_last is not None:
        raise UsageError("--ema and --average-last both average the student's weights; take one.")
    assert chosen.epochs is not None
    if chosen.average_last is not None and chosen.average_last > chosen.epochs:
        raise UsageError(
            f"--average-last {chosen.average_last} is more than --epochs {chosen.epochs}; take fewer."
        )


def _warmup(whose: str, asked: float | None, epochs: int, recipe: str | None) -> float:
    if asked is None:
        return defaults.choose_warmup_epochs(epochs)
    if asked >= epochs:
        raise UsageError(
            f"--{whose}warmup-epochs {asked:g}{f' of --recipe {recipe}' if recipe else ''} leaves nothing of "
            f"--{whose}epochs {epochs}; take fewer."
        )
    return asked


def _choose_views(chosen: Options, data: ImageSet) -> None:
    assert chosen.image_size is not None
    chosen.crop = chosen.crop or ("pad" if defaults.is_small(_median_short_side(data)) else "resized")
    for name, crop in (("crop_scale", "resized"), ("pad", "pad"), ("pad_mode", "pad")):
        if getattr(chosen, name) is not None and chosen.crop != crop:
            raise UsageError(
                f"--{name.replace('_', '-')} belongs to --crop {crop}, and this run's is {chosen.crop}; "
                "leave one of them out."
            )
    if chosen.crop == "resized":
        chosen.crop_scale = 0.25 if chosen.crop_scale is None else chosen.crop_scale
    elif chosen.crop == "pad":
        if chosen.pad is None:
            resized = int(chosen.image_size / geometry(chosen.student, chosen.image_size).crop_fraction)
            chosen.pad = defaults.compute_pad(chosen.image_size, resized)
        chosen.pad_mode = chosen.pad_mode or "zeros"
        if chosen.pad >= chosen.image_size:
            raise UsageError(f"--pad {chosen.pad} is not less than the image size, {chosen.image_size}.")
    if chosen.flip is None:
        chosen.flip = chosen.data != DIGITS
    chosen.color_jitter = chosen.color_jitter or 0.0


def _check_lists(chosen: Options) -> None:
    for name in ("teacher_weights", "teacher_head"):
        given = getattr(chosen, name)
        if len(given) == 1:
            setattr(chosen, name, given * len(chosen.teacher))
        elif len(given) != len(chosen.teacher):
            raise UsageError(
                f"--{name.replace('_', '-')} is given {len(given)} times for {len(chosen.teacher)} teachers; "
                "give it once for each --teacher, in the same order."
            )
    for source, head in zip(chosen.teacher_weights, chosen.teacher_head, strict=True):
        weights = _start(source, chosen.data)
        if weights == "none" and head == "none":
            raise UsageError(
                "--teacher-head none is for a teacher that has learned already, and --teacher-weights "
                f"{source}{' means none for the digits and' if source != weights else ''} starts from "
                "scratch; name a file of weights."
            )
        if weights == "none" and head == "keep":
            raise UsageError(
                "--teacher-head keep needs weights with a head; --teacher-weights none has none."
            )


def _check_weights_of_losses(chosen: Options, methods: list[str]) -> None:
    for name, value in chosen.weight.items():
        if name not in [*methods, "ce"]:
            raise UsageError(
                f"--weight {name}={value:g}: this run's losses are {', '.join([*methods, 'ce'])}."
            )
        if value < 0:
            raise UsageError(f"--weight {name}={value:g}: a weight is not negative.")
    if chosen.weight.get("ce", 1) == 0 and not any(chosen.weight.get(name, 1) for name in methods):
        raise UsageError("With these weights nothing is left to learn from; leave one loss above zero.")


def _check_weights_file(source: str, whose: str) -> None:
    path = Path(source)
    if source in ("auto", "none") or path.is_file():
        return
    if not path.is_dir():
        raise UsageError(f"The weights file {source} does not exist; say auto, none or an existing file.")
    # A run's own: of several teachers each has a number.
    inside = sorted(path.glob(f"{whose}.safetensors")) or sorted(path.glob(f"{whose}.*.safetensors"))
    advice = f"name a file in it, as in {inside[0]}" if inside else "say auto, none or an existing file"
    raise UsageError(f"--{whose}-weights {source} is a folder; {advice}.")


def _check_optimizer(name: str) -> None:
    from timm.optim import list_optimizers

    known = [str(one) for one in list_optimizers()]
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, n=3)
        advice = f"the nearest are {', '.join(near)}" if near else "try adamw or sgd"
        raise UsageError(f"There is no optimizer '{name}'; {advice}.")


def _check_schedule(chosen: Options) -> None:
    if chosen.schedule == "multistep" and not chosen.milestones:
        raise UsageError("--schedule multistep needs --milestones, such as 150,180,210.")
    if chosen.milestones and chosen.schedule != "multistep":
        raise UsageError(f"--milestones belong to --schedule multistep, not {chosen.schedule}.")


def _median_short_side(data: ImageSet) -> int:
    """From the headers of a sample of the training images; nothing is decoded."""
    sizes = sample_sizes(data.train)
    return round(statistics.median(map(min, sizes))) if sizes else defaults.SMALL_IMAGES + 1
