"""Every option of a run: its name, type, help, group, and the first stage whose result it changes.

The command line, `config.yaml`, the Python API and the documentation are all made from this one list.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from ...export.text import spelled_out
from ..runs.interrupt import seconds
from .limits import no_truth, within

STAGES = ("teacher", "prepare", "student", "export", "quantize", "validate", "bench", "report")
Stage = Literal["teacher", "prepare", "student", "export", "qat", "quantize", "validate", "bench", "report"]


def option(help: str, default: Any = None, *, group: str, enters: str | None = None, **limits: Any) -> Any:
    """A field with its group in `--help` and the first stage whose hash it enters (None: no stage's)."""
    return Field(default, description=help, json_schema_extra={"group": group, "enters": enters}, **limits)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


def pairs(value: Any) -> Any:
    """``["quest.tau=0.2"]`` as ``{"quest.tau": "0.2"}``; a mapping stays as it is."""
    if not isinstance(value, list | tuple):
        return value
    found = {}
    for item in value:
        key, equals, setting = str(item).partition("=")
        if not equals:
            raise ValueError(f"'{spelled_out(str(item))}' is not of the form KEY=VALUE")
        # A value with commas is a list, as in quest.levels=map,map@2.
        found[key.strip()] = setting.split(",") if "," in setting else setting.strip()
    return found


def _epochs(value: Any) -> Any:
    epochs = [int(part) for part in value.split(",")] if isinstance(value, str) else value
    if isinstance(epochs, list) and (epochs != sorted(set(epochs)) or epochs[0] < 1):
        raise ValueError("epochs stand in rising order, from 1 on, as in 150,180,210")
    return epochs


def _time(value: Any) -> Any:
    return seconds(value) if isinstance(value, str) else value


Time = Annotated[float, BeforeValidator(_time), Field(gt=0, le=1e9)]
Names = Annotated[list[str], BeforeValidator(_listed)]
Settings = Annotated[dict[str, Any], BeforeValidator(pairs)]
Heads = Annotated[list[Literal["auto", "keep", "replace", "none"]], BeforeValidator(_listed)]
Targets = Annotated[list[Literal["x86", "x86-vnni", "arm64"]], BeforeValidator(_listed)]
Epochs = Annotated[list[int], BeforeValidator(_epochs)]
Weights = Annotated[dict[str, float], BeforeValidator(pairs)]


class Options(BaseModel):
    """What the user asked for; a value of None is chosen for him (see ``defaults``)."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)
    _within = field_validator("*")(within)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        return no_truth(value, cls.model_fields[str(info.field_name)].annotation)

    teacher: Names = option("timm name of the teacher", ..., group="What", enters="teacher", min_length=1)
    student: str = option(
        "timm name of the student, or a short one: mobilenetv2, mobilenetv3, mobilenetv4, resnet18 …",
        ...,
        group="What",
        enters="prepare",
    )
    activation: Literal["relu", "relu6"] | None = option(
        "the student's activation, such as relu6 for a mobilenetv3 that is fast in int8 [default: its own]",
        group="What",
        enters="prepare",
    )
    data: str = option(
        "a folder of class folders (with or without train/ val/ test/), a labels file (.csv, .jsonl, or COCO's .json) for images of several labels, a timm data set name such as torch/cifar100, or digits: the built-in handwritten digits",
        "digits",
        group="What",
    )
    data_dir: Path | None = option(
        "where a named data set lies or is downloaded to; the folder of a labels file's images", group="What"
    )
    download: bool = option("download a named data set when it is not there", False, group="What")
    out: Path | None = option("the run folder [default: runs/TEACHER-STUDENT-DATA]", group="What")
    config: Path | None = option(
        "a YAML file of options, such as a run's config.yaml; the command line wins", group="What"
    )

    teacher_weights: Names = option(
        "auto: timm's pretrained weights (digits: none); none: from scratch; or a file (safetensors or torch)",
        ["auto"],
        group="Weights",
        enters="teacher",
        min_length=1,
    )
    teacher_head: Heads = option(
        "auto: keep a head that fits the data's classes, else replace it and tune the teacher; "
        "none: a teacher of features alone, which is not tuned",
        ["auto"],
        group="Weights",
        enters="teacher",
        min_length=1,
    )
    teachers_from_seeds: int = option(
        "train so many teachers of one architecture, each from a seed of its own",
        1,
        group="Weights",
        enters="teacher",
        ge=1,
        le=100,
    )
    student_weights: str = option(
        "auto, none or a file, as for the teacher", "auto", group="Weights", enters="student"
    )

    method: str = option(
        "how the student learns: quest, kd, dkd, dist, mimic, feed, a sum such as quest+dkd, or none for no teacher",
        "quest",
        group="Method",
        enters="prepare",
    )
    recipe: str | None = option(
        "a paper's hyper-parameters, such as quest-cifar100 (compress recipes lists them); "
        "what you say yourself wins over it",
        group="Method",
    )
    settings: Settings = option(
        "a method's parameter, METHOD.KEY=VALUE, as in quest.tau=0.2; may be repeated",
        {},
        group="Method",
        enters="prepare",
    )
    weight: Weights = option(
        "weight of a loss, NAME=VALUE: a method's name, or ce for the cross-entropy; may be repeated",
        {},
        group="Method",
        enters="student",
    )

    balance: Literal["auto", "off"] | None = option(
        "auto: scale a method's weight, up or down, where its gradients are out of proportion to the labels' "
        "[default: auto; off with a recipe, a weight of your own, or several labels an image]",
        group="Method",
        enters="student",
    )

    cache_views: int | None = option(
        "fixed views of each image whose answers by the teachers are stored and used by later epochs and runs; "
        "0: ask the teachers at every step",
        group="Method",
        enters="student",
        ge=0,
    )
    cache_top: int | None = option(
        "words of each position that the store keeps of QuEST's target: --set quest.top for stored answers "
        "[default: as many as lose no more than 6 %]",
        group="Method",
        enters="prepare",
        ge=1,
    )

    rounds: int = option(
        "so many students one after another, each the next one's teacher; the last one ships",
        1,
        group="Method",
        enters="prepare",
        ge=1,
        le=100,
    )

    epochs: int | None = option("epochs of the student", group="Training", enters="student", ge=1)
    teacher_epochs: int | None = option(
        "epochs of a teacher that is trained or tuned here", group="Training", enters="teacher", ge=1
    )
    batch_size: int | None = option(
        "images per step, over all devices", group="Training", enters="teacher", ge=2
    )
    micro_batch: int | None = option(
        "images on a device at once: a step's gradients are summed over parts of this size (BatchNorm's "
        "statistics are each part's own) [default: all; halved when memory runs out]",
        group="Training",
        enters="teacher",
        ge=2,
    )
    sync_bn: bool = option(
        "with several GPUs, BatchNorm's statistics over all of them",
        False,
        group="Training",
        enters="teacher",
    )
    optimizer: str | None = option(
        "timm's name of the optimizer: adamw, sgd (with Nesterov momentum) …",
        group="Training",
        enters="teacher",
    )
    lr: float | None = option("peak learning rate of the student", group="Training", enters="student", gt=0)
    teacher_lr: float | None = option(
        "peak learning rate of a teacher trained or tuned here", group="Training", enters="teacher", gt=0
    )
    schedule: Literal["cosine", "onecycle", "multistep", "constant"] | None = option(
        "how the learning rate falls", group="Training", enters="teacher"
    )
    milestones: Epochs | None = option(
        "epochs at which multistep divides the learning rate by 10, as in 150,180,210",
        group="Training",
        enters="teacher",
    )
    warmup_epochs: float | None = option(
        "epochs over which the student's learning rate rises", group="Training", enters="student", ge=0
    )
    teacher_warmup_epochs: float | None = option(
        "the same of a teacher trained or tuned here", group="Training", enters="teacher", ge=0
    )
    weight_decay: float | None = option("weight decay", group="Training", enters="teacher", ge=0)
    decay_all: bool = option(
        "decay biases and norms too, as the papers' recipes do", False, group="Training", enters="teacher"
    )
    label_smoothing: float | None = option(
        "smoothing of the labels in the cross-entropy", group="Training", enters="teacher", ge=0, lt=1
    )
    ema: float | None = option(
        "ship a running mean of the student's weights with this decay, such as 0.999",
        group="Training",
        enters="student",
        gt=0,
        lt=1,
    )
    average_last: int | None = option(
        "ship the mean of the student's weights after each of so many last epochs",
        group="Training",
        enters="student",
        ge=1,
    )
    seed: int = option("seed of weights, order and views", 0, group="Training", enters="teacher", ge=0)

    image_size: int | None = option(
        "side of the networks' input in pixels [default: the student's own; digits: 64]",
        group="Images",
        enters="teacher",
        ge=8,
        le=4096,
    )
    student_size: int | None = option(
        "side of the student's input, where that is less: it sees the teacher's crops scaled down "
        "[default: --image-size]",
        group="Images",
        enters="prepare",
        ge=8,
        le=4096,
    )
    val_fraction: float | None = option(
        "share of train held out for selecting, where the data has no val/ of its own [default: 0.1]",
        group="Images",
        enters="teacher",
        ge=0,
        lt=1,
    )
    crop: Literal["pad", "resized", "center"] | None = option(
        "training crops: pad (shift a little), resized (random-resized-crop) or center",
        group="Images",
        enters="teacher",
    )
    crop_scale: float | None = option(
        "smallest share of the picture that a resized crop shows",
        group="Images",
        enters="teacher",
        gt=0,
        le=1,
    )
    pad: int | None = option("pixels of padding of a pad crop", group="Images", enters="teacher", ge=0)
    pad_mode: Literal["zeros", "reflect", "edge"] | None = option(
        "what the padding shows", group="Images", enters="teacher"
    )
    flip: bool | None = option("mirror half of the training views", group="Images", enters="teacher")
    color_jitter: float | None = option(
        "strength of brightness, contrast and saturation changes",
        group="Images",
        enters="teacher",
        ge=0,
        le=1,
    )

    calibrate: bool = option(
        "fit one temperature on the val role and fold it into the exported files, so that their "
        "probabilities are honest",
        False,
        group="Export",
        enters="export",
    )
    input: Literal["float", "uint8"] = option(
        "what the files take: float, normalised outside; or uint8, pixels [batch, S, S, 3] as they are, the "
        "normalisation being in the first convolution's weights",
        "float",
        group="Export",
        enters="export",
    )
    calibration_images: int = option(
        "training images that int8 is calibrated on", 512, group="Export", enters="quantize", ge=1
    )
    calibration: Literal["auto", "minmax", "moving-average", "entropy", "percentile"] = option(
        "how activation ranges are chosen; auto: each way is tried, and the best is taken",
        "auto",
        group="Export",
        enters="quantize",
    )
    target: Targets = option(
        "the processors int8 is for: x86 (safe on all), x86-vnni, arm64; several get a file each "
        "[default: what this machine is]",
        [],
        group="Export",
        enters="quantize",
    )
    max_drop: float = option(
        "points of accuracy that int8 may lose on the val role",
        0.5,
        group="Export",
        enters="quantize",
        ge=0,
    )
    qat: bool = option(
        "let the student learn on as the int8 network it will be, by the same method from the same teacher",
        False,
        group="Export",
        enters="qat",
    )
    qat_epochs: int | None = option(
        "epochs of --qat [default: a tenth of --epochs]", group="Export", enters="qat", ge=1
    )
    qat_lr: float | None = option(
        "peak learning rate of --qat [default: a tenth of --lr]", group="Export", enters="qat", gt=0
    )
    opset: int = option(
        "version of ONNX's operators in the files that ship; a higher one needs a newer runtime",
        18,
        group="Export",
        enters="export",
    )
    bench_seconds: float = option(
        "seconds of measuring for each network and thread count", 2.0, group="Export", enters="bench", gt=0
    )

    until: Stage | None = option("stop after this stage", group="Running")
    fresh: bool = option("start the run over", False, group="Running")
    dry_run: bool = option("check everything, estimate time and disk, and stop", False, group="Running")
    time_limit: Time | None = option(
        "stop cleanly after this time, such as 3h50m; the same command goes on (exit code 75)",
        group="Running",
    )
    device: str | None = option("cuda, mps or cpu [default: the first there is]", group="Running")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "arithmetic of training; auto: bf16 where it pays", "auto", group="Running"
    )
    compile: Literal["auto", "on", "off"] = option(
        "torch.compile of the networks in training; auto: where it is measured to pay, in long trainings",
        "auto",
        group="Running",
    )
    resident: Literal["auto", "device", "host", "workers"] = option(
        "where training pixels are: on the device, decoded once in host memory, or decoded by workers when wanted; auto: the first they fit in",
        "auto",
        group="Running",
    )
    cache: Path | None = option(
        "folder for what runs share: decoded images, vocabularies, teachers' answers [default: the user's cache folder]",
        group="Running",
    )
    tensorboard: bool = option(
        "write the curves for TensorBoard too, into the run folder", False, group="Running"
    )
    track: Literal["wandb", "mlflow"] | None = option(
        "send the curves to Weights & Biases or MLflow too; without an account or a server they stay in the run folder",
        group="Running",
    )
    quiet: bool = option("say nothing but the result", False, group="Running")
    verbose: bool = option(
        "say more: what was chosen, each epoch, each int8 candidate, what the libraries remark",
        False,
        group="Running",
    )
    json_: bool = Field(
        False,
        alias="json",
        description="print report.json instead of the table",
        json_schema_extra={"group": "Running", "enters": None},
    )


def enters(name: str) -> str | None:
    """The first stage whose result the option changes; None for those that change no result."""
    extra = Options.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    stage = extra["enters"]
    return stage if isinstance(stage, str) else None


def group(name: str) -> str:
    """The heading under which `--help` lists the option."""
    extra = Options.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return {"settings": "--set", "json_": "--json"}.get(name, f"--{name.replace('_', '-')}")
