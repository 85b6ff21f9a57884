"""Every option of a run: its type, help, group, and the first stage whose result it changes.

The command line, ``config.yaml``, the Python API and docs/command-line.md are made from this list.
"""

import operator
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from .limits import check_limits, check_not_boolean

GROUPS = ("Models and data", "Weights", "Method", "Training", "Images", "Export", "Execution")
STAGES = ("teacher", "prepare", "student", "export", "quantize", "validate", "bench", "report")
Stage = Literal[
    "teacher", "prepare", "student", "export", "qat", "quantize", "validate", "bench", "baseline", "report"
]


def option(help: str, default: Any = None, *, group: str, enters: str | None = None, **limits: Any) -> Any:
    """Return a field with its heading in ``--help`` and the first stage whose hash it enters, or None."""
    return Field(default, description=help, json_schema_extra={"group": group, "enters": enters}, **limits)


data_option = partial(option, group="Models and data")
weights_option = partial(option, group="Weights")
method_option = partial(option, group="Method")
training_option = partial(option, group="Training", enters="teacher")
image_option = partial(option, group="Images", enters="teacher")
export_option = partial(option, group="Export")
execution_option = partial(option, group="Execution")


def _to_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


def parse_pairs(value: Any) -> Any:
    """Return ``["quest.tau=0.2"]`` as ``{"quest.tau": "0.2"}``, and mappings unchanged."""
    if not isinstance(value, list | tuple):
        return value
    pairs = {}
    for item in value:
        key, equals, setting = str(item).partition("=")
        if not equals:
            raise ValueError("must be KEY=VALUE")
        # A value with commas is a list, such as quest.levels=map,map@2.
        pairs[key.strip()] = setting.split(",") if "," in setting else setting.strip()
    return pairs


def _check_increasing(values: list[int]) -> list[int]:
    if values != sorted(set(values)):
        raise ValueError("must be increasing, such as 150,180,210")
    return values


TIME_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_time(value: Any) -> Any:
    """Return the seconds of ``3h50m``, ``90m``, ``45s`` or ``2d``, and numbers unchanged."""
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", value):
        raise ValueError("must be a time such as 3h50m, 90m or 45s")
    return sum(float(number) * TIME_UNITS[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", value))


MIN_SIDE, MAX_SIDE = 8, 4096
"""Pixels of a network's input."""


def parse_size(value: Any) -> Any:
    """Return (height, width) of ``96,36`` or ``96x36``, and the side of a square, such as ``224``.

    Raises:
        ValueError: the value is not a size.
    """
    parts = re.split(r"\s*[,x×]\s*", value.strip()) if isinstance(value, str) else value
    try:
        parts = parts if isinstance(parts, list | tuple) else [parts]
        sides = [int(side) if isinstance(side, str) else operator.index(side) for side in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2):
        raise ValueError("must be pixels of a side, such as 224, or of height and width, such as 96x36")
    if not MIN_SIDE <= min(sides) <= max(sides) <= MAX_SIDE:
        raise ValueError(f"must be {MIN_SIDE} to {MAX_SIDE} pixels")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


def parse_randaugment(value: Any) -> Any:
    """Return [N, M] of ``2,9``, the number and strength of RandAugment's operations, and 0 unchanged.

    Raises:
        ValueError: the value is not such a pair.
    """
    if value in (0, "0"):
        return 0
    parts = value.split(",") if isinstance(value, str) else value
    try:
        count, strength = (int(part) if isinstance(part, str) else operator.index(part) for part in parts)
    except (TypeError, ValueError):
        count, strength = 0, 0
    if not (1 <= count <= 8 and 0 <= strength <= 30):
        raise ValueError("must be N,M, the number of operations (1 to 8) and strength (0 to 30), or 0")
    return [count, strength]


ImageSize = Annotated[int | tuple[int, int], BeforeValidator(parse_size)]
RandAugment = Annotated[list[int] | Literal[0], BeforeValidator(parse_randaugment)]
Time = Annotated[float, BeforeValidator(parse_time), Field(gt=0, le=1e9)]
Names = Annotated[list[str], BeforeValidator(_to_list)]
Settings = Annotated[dict[str, Any], BeforeValidator(parse_pairs)]
Heads = Annotated[list[Literal["auto", "keep", "replace", "none"]], BeforeValidator(_to_list)]
Targets = Annotated[list[Literal["x86", "x86-vnni", "arm64"]], BeforeValidator(_to_list)]
Formats = Annotated[list[Literal["fp16", "ort"]], BeforeValidator(_to_list)]
Epochs = Annotated[
    list[Annotated[int, Field(ge=1)]],
    Field(min_length=1),
    BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value),
    AfterValidator(_check_increasing),
]
LossWeights = Annotated[dict[str, float], BeforeValidator(parse_pairs)]


class Options(BaseModel):
    """The options of a run. None is replaced by a default that depends on the data, see ``defaults``."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)
    _check_limits = field_validator("*")(check_limits)

    @field_validator("*", mode="before")
    @classmethod
    def _check_not_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        return check_not_boolean(value, cls.model_fields[str(info.field_name)].annotation)

    teacher: Names = data_option(
        "timm name of the teacher; repeat for an ensemble", ..., enters="teacher", min_length=1
    )
    student: str = data_option(
        "timm name of the student, or a short name: mobilenetv2, mobilenetv3, mobilenetv4, resnet18 …",
        ...,
        enters="prepare",
    )
    activation: Literal["relu", "relu6"] | None = data_option(
        "activation of the student, such as relu6 for a mobilenetv3 that is fast in int8 [default: unchanged]",
        enters="prepare",
    )
    data: str = data_option(
        "folder of class folders (with or without train/ val/ test/), labels file (.csv, .jsonl or COCO .json) for several labels per image, timm data set such as torch/cifar100, or digits, the built-in handwritten digits",
        "digits",
    )
    data_dir: Path | None = data_option("folder of a named data set, or of a labels file's images")
    download: bool = data_option("download a named data set if it is missing", False)
    follow_links: bool = data_option(
        "follow links that lead out of the data folder, such as those of DVC and git-annex", False
    )
    unlabeled: Path | None = data_option(
        "folder of images without labels, at any depth, from which the student learns the teacher's outputs"
    )
    out: Path | None = data_option("run folder [default: runs/TEACHER-STUDENT-DATA]")
    config: Path | None = data_option(
        "YAML file of options, such as a run's config.yaml; the command line takes precedence"
    )

    teacher_weights: Names = weights_option(
        "auto: timm's pretrained weights (digits: none); none: random; or a safetensors or torch file",
        ["auto"],
        enters="teacher",
        min_length=1,
    )
    teacher_head: Heads = weights_option(
        "auto: keep a head that fits the classes, otherwise replace it and fine-tune; keep; replace; none: use the teacher's features only, without fine-tuning",
        ["auto"],
        enters="teacher",
        min_length=1,
    )
    teachers_from_seeds: int = weights_option(
        "number of teachers of one architecture to train from different seeds",
        1,
        enters="teacher",
        ge=1,
        le=100,
    )
    student_weights: str = weights_option(
        "auto, none or a file, as for --teacher-weights", "auto", enters="student"
    )

    method: str = method_option(
        "auto: see the defaults; quest, kd, dkd, dist, wttm, sdd, mimic, itrd, feed, pkd, a sum such as quest+dkd, or none to train on labels only",
        "auto",
        enters="prepare",
    )
    recipe: str | None = method_option(
        "hyperparameters of a paper, such as quest-cifar100 (see compress recipes); other options take precedence"
    )
    settings: Settings = method_option(
        "parameter of a method, such as quest.tau=0.2; can be repeated", {}, enters="prepare"
    )
    weight: LossWeights = method_option(
        "weight of a loss: KEY is a method, or ce for the cross-entropy; can be repeated",
        {},
        enters="student",
    )
    balance: Literal["auto", "off"] | None = method_option(
        "auto: rescale a method's weight if its gradients are out of proportion to those of the labels [default: auto; off with a recipe, --weight, multi-label data or detectors]",
        enters="student",
    )
    cache_views: int | None = method_option(
        "number of fixed views of each image whose teacher outputs are cached and reused in later epochs and runs; 0: new views in every epoch, without a cache",
        enters="student",
        ge=0,
    )
    cache_top: int | None = method_option(
        "number of visual words cached per position for QuEST, same as --set quest.top [default: enough to lose at most 6 %]",
        enters="prepare",
        ge=1,
    )
    rounds: int = method_option(
        "number of sequential distillation rounds; each student teaches the next, the last one is exported",
        1,
        enters="prepare",
        ge=1,
        le=100,
    )

    baseline: bool = training_option(
        "also train the student without the teacher, and report what the teacher brought",
        False,
        enters="baseline",
    )
    epochs: int | None = training_option("epochs of the student", enters="student", ge=1)
    teacher_epochs: int | None = training_option("epochs of a teacher that is trained or fine-tuned", ge=1)
    batch_size: int | None = training_option("labeled images per step, over all devices", ge=2)
    unlabeled_ratio: float | None = training_option(
        "images of --unlabeled per labeled image in each step [default: 1]", enters="student", gt=0, le=100
    )
    micro_batch: int | None = training_option(
        "images per forward pass on a device; gradients of a step are accumulated (BatchNorm statistics are per micro-batch) [default: whole batch, halved if memory runs out]",
        ge=2,
    )
    sync_bn: bool = training_option("synchronize BatchNorm statistics across GPUs", False)
    optimizer: str | None = training_option(
        "timm name of the optimizer: adamw, sgd (with Nesterov momentum) …"
    )
    lr: float | None = training_option("peak learning rate of the student", enters="student", gt=0)
    teacher_lr: float | None = training_option(
        "peak learning rate of a teacher that is trained or fine-tuned", gt=0
    )
    schedule: Literal["cosine", "onecycle", "multistep", "constant"] | None = training_option(
        "learning rate schedule"
    )
    milestones: Epochs | None = training_option(
        "epochs at which multistep divides the learning rate by 10, such as 150,180,210"
    )
    warmup_epochs: float | None = training_option("warmup epochs of the student", enters="student", ge=0)
    teacher_warmup_epochs: float | None = training_option(
        "warmup epochs of a teacher that is trained or fine-tuned", ge=0
    )
    weight_decay: float | None = training_option("weight decay", ge=0)
    decay_all: bool = training_option(
        "apply weight decay to biases and norms too, as most papers' recipes do", False
    )
    label_smoothing: float | None = training_option("label smoothing of the cross-entropy", ge=0, lt=1)
    ema: float | None = training_option(
        "export an exponential moving average of the student's weights with this decay, such as 0.999",
        enters="student",
        gt=0,
        lt=1,
    )
    average_last: int | None = training_option(
        "export the mean of the student's weights over this number of last epochs", enters="student", ge=1
    )
    seed: int = training_option("seed of weights, order and augmentation", 0, ge=0)
    deterministic: bool = training_option(
        "use torch's deterministic operations and convolutions on a GPU, for runs that are equal to the bit (slower)",
        False,
    )

    image_size: ImageSize | None = image_option(
        "pixels of the input: of its side, such as 224, or height,width, such as 96,36 [default: the student's; digits: 40]"
    )
    student_size: ImageSize | None = image_option(
        "size of the student's input if it is smaller; it sees the teacher's crops scaled down [default: --image-size]",
        enters="prepare",
    )
    resize: Literal["crop", "squash", "pad"] | None = image_option(
        "shape of images with another aspect ratio than the input's: crop (the center), squash (stretch) or pad (add a border) [default: as the network was trained, mostly crop]"
    )
    val_fraction: float | None = image_option(
        "fraction of the training images used for validation if the data has no val/ [default: 0.1]",
        ge=0,
        lt=1,
    )
    crop: Literal["pad", "resized", "center"] | None = image_option(
        "training crops: pad (shift a few pixels), resized (random resized crop) or center"
    )
    crop_scale: float | None = image_option(
        "smallest fraction of the image area in a resized crop", gt=0, le=1
    )
    pad: int | None = image_option("pixels of padding of a pad crop", ge=0)
    pad_mode: Literal["zeros", "reflect", "edge"] | None = image_option("padding mode of a pad crop")
    flip: bool | None = image_option("flip half of the training images horizontally")
    color_jitter: float | None = image_option(
        "strength of brightness, contrast and saturation jitter", ge=0, le=1
    )
    randaugment: RandAugment | None = image_option(
        "RandAugment: N operations of strength M, up to 30, on each training image, such as 2,9; 0 for none"
    )
    erasing: float = image_option(
        "probability of erasing a random rectangle of a training image", 0.0, ge=0, le=1
    )
    mixup: float = image_option(
        "blend training images with others, in a ratio from Beta(A, A), such as 0.2", 0.0, ge=0, le=100
    )
    cutmix: float = image_option(
        "fill a rectangle of training images from others, of an area from Beta(A, A)", 0.0, ge=0, le=100
    )

    calibrate: bool = export_option(
        "fit a temperature on the validation split and fold it into the exported files, for calibrated probabilities",
        False,
        enters="export",
    )
    input: Literal["float", "uint8"] = export_option(
        "input of the exported files: float (normalized), or uint8 (pixels [batch, H, W, 3]; normalization is folded into the first convolution)",
        "float",
        enters="export",
    )
    calibration_images: int = export_option(
        "training images used to calibrate int8", 512, enters="quantize", ge=1
    )
    calibration: Literal["auto", "minmax", "percentile", "moving-average", "entropy"] = export_option(
        "method to choose activation ranges; auto: try them until one loses nothing, and use the best",
        "auto",
        enters="quantize",
    )
    target: Targets = export_option(
        "processors of the int8 files: x86 (safe on all), x86-vnni, arm64; repeat for one file each [default: this machine's]",
        [],
        enters="quantize",
    )
    max_drop: float = export_option(
        "accuracy that int8 may lose on the validation split, in percentage points",
        0.5,
        enters="quantize",
        ge=0,
    )
    qat: bool = export_option(
        "quantization-aware training: fine-tune the student as int8 with the same method and teacher",
        False,
        enters="qat",
    )
    qat_epochs: int | None = export_option(
        "epochs of --qat [default: a tenth of --epochs]", enters="qat", ge=1
    )
    qat_lr: float | None = export_option(
        "peak learning rate of --qat [default: a tenth of --lr]", enters="qat", gt=0
    )
    opset: int = export_option(
        "ONNX opset of the exported files; a higher one requires a newer runtime", 18, enters="export"
    )
    batch: Literal["dynamic", "1"] = export_option(
        "batch size of the exported files: dynamic (any), or 1, which compilers for phones require",
        "dynamic",
        enters="export",
    )
    formats: Formats = export_option(
        "further files, each checked against its source: fp16 (for browsers and GPUs), ort (fp32 and int8 in "
        "ONNX Runtime's own format, for its minimal builds)",
        [],
        enters="validate",
    )
    bench_seconds: float = export_option(
        "seconds of measurement per network and number of threads", 1.0, enters="bench", gt=0
    )

    until: Stage | None = execution_option("stop after this stage")
    fresh: bool = execution_option("start the run over; results in --cache are reused", False)
    dry_run: bool = execution_option("check all options, estimate time and disk space, and stop", False)
    time_limit: Time | None = execution_option(
        "stop after this time, such as 3h50m, with exit code 75; the same command resumes"
    )
    device: str | None = execution_option("cuda, mps or cpu [default: the first available]")
    precision: Literal["auto", "fp32", "bf16"] = execution_option(
        "precision of training; auto: bf16, or fp16 on older GPUs, if it is faster", "auto"
    )
    threads: int | None = execution_option(
        "threads of training and export, recorded in run.json; only runs with equal numbers have files that are equal to the byte [default: the available cores]",
        ge=1,
        le=256,
    )
    compile: Literal["auto", "on", "off"] = execution_option(
        "compile the networks with torch.compile; auto: if it is measured to be faster over the whole training",
        "auto",
    )
    resident: Literal["auto", "device", "host", "workers"] = execution_option(
        "location of training images: device memory, host memory, or decoded on the fly by workers; auto: the first in which they fit",
        "auto",
    )
    cache: Path | None = execution_option(
        "folder shared by runs: decoded images, vocabularies, trained teachers, teacher outputs [default: the user's cache folder]"
    )
    tensorboard: bool = execution_option("write TensorBoard logs to the run folder", False)
    track: Literal["wandb", "mlflow"] | None = execution_option(
        "log to Weights & Biases or MLflow; without an account or server, to the run folder"
    )
    quiet: bool = execution_option("print only the result", False)
    verbose: bool = execution_option("print defaults, epochs, int8 candidates and log messages", False)
    json_: bool = Field(
        False,
        alias="json",
        description="print report.json instead of a table",
        json_schema_extra={"group": "Execution", "enters": None},
    )


def get_stage(name: str) -> str | None:
    """Return the first stage whose result the option changes, or None."""
    stage = _extra(name)["enters"]
    return stage if isinstance(stage, str) else None


def get_group(name: str) -> str:
    """Return the option's heading in ``--help``."""
    return str(_extra(name)["group"])


def _extra(name: str) -> dict[str, Any]:
    extra = Options.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra


def get_flag(name: str) -> str:
    """Return the option's name on the command line."""
    return {"settings": "--set", "json_": "--json"}.get(name, f"--{name.replace('_', '-')}")
