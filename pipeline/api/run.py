"""The whole job: check, then stage after stage, each done only where it is missing."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .. import methods
from ..config import bounded_yaml, recipes
from ..config import stages as rounds
from ..config.options import Options, enters, group, pairs
from ..data.dataset import ImageSet
from ..data.sources.folders import one_role_alone
from ..errors import UsageError
from ..runs import main_process
from ..runs.cache import Cache
from ..runs.console import Display
from ..runs.device import choose_device
from ..runs.files import command, refuse_inside_data, sha256
from ..runs.folder import RunFolder, StageResult
from ..runs.interrupt import STOP
from ..runs.results import Report
from ..training.compute.distributed import Ranks, check_ranks, join, leave
from ..training.job import Job
from ..training.weights import check_weights
from .dry_run import dry_run
from .resolve import DIGITS, resolve

TRAINING = ("teacher", rounds.ROUND, "student")
"""Stages in which all ranks work."""

TOGETHER = (*TRAINING, "prepare")
"""Stages before which no rank leaves."""


def compress(
    *,
    teacher: str | list[str] | None = None,
    student: str | None = None,
    data: str | Path | None = None,
    **options: Any,
) -> Report:
    """Teacher to shipped student: the same as the command, with its options as keywords.

    Args:
        teacher: timm's name of the teacher, or several.
        student: timm's name of the student.
        data: a folder, a timm data set name, or ``digits``.
        options: any of :class:`~questpress.pipeline.config.options.Options`; ``config`` names a YAML
            file of them.

    Returns:
        What ``report.json`` in the run folder holds.

    Raises:
        UsageError: an option is wrong (``exit_code`` 2).
        JobError: the job was started and failed (``exit_code`` 1). Errors of models and export likewise.
    """
    given = {
        "teacher": teacher,
        "student": student,
        "data": str(data) if data is not None else None,
        **options,
    }
    with STOP.listens():
        ranks = join()
        try:
            asked = read_options({key: value for key, value in given.items() if value is not None})
            display = Display(quiet=asked.quiet or not ranks.is_main, verbose=asked.verbose)
            with STOP.after(asked.time_limit), display.remarks():
                return _compress(asked, ranks, display)
        except BaseException:
            main_process.first_to_end()  # decided before the other processes notice that this one is gone
            raise
        finally:
            leave()


def _compress(asked: Options, ranks: Ranks, display: Display) -> Report:
    if asked.quiet and asked.verbose:
        raise UsageError("--quiet and --verbose ask for opposite things; leave one out.")
    chosen, images = resolve(asked)
    assert chosen.out is not None
    refuse_inside_data(chosen.data, {"--out": chosen.out, "--cache": chosen.cache})
    device = choose_device(chosen.device, ranks)
    check_ranks(chosen, ranks, len(images.train), device)
    if chosen.data == DIGITS:
        display.say(
            "The built-in handwritten digits (1,797 images) stand in for your data; "
            "name your own with --data FOLDER, a folder of class folders."
        )
    if (alone := one_role_alone(Path(str(chosen.data)).expanduser())) is not None:
        display.note(alone)
    if asked.batch_size and chosen.batch_size != asked.batch_size:
        display.note(f"--batch-size {asked.batch_size} is more than there are: all images are one batch")
    longest = max(chosen.epochs or 0, chosen.teacher_epochs or 0)
    if late := [str(epoch) for epoch in chosen.milestones or () if epoch >= longest]:
        display.note(
            f"the learning rate does not fall at epoch {', '.join(late)} of --milestones: the training has "
            f"{longest} epochs"
        )
    display.detail(f"chosen: {_chosen(chosen, asked)}")
    if chosen.dry_run:
        return dry_run(chosen, _config(chosen, images), images, device, display)
    return _run(chosen, frozenset(asked.model_fields_set), images, device, display, ranks)


def _chosen(options: Options, asked: Options) -> str:
    """The options that were not said and have a value now."""
    values, said = _repeatable(options), asked.model_fields_set
    told = [
        f"{flag(name)} {value}"
        for name, value in values.items()
        if name not in said and value not in (None, [], {}, False)
    ]
    return ", ".join(told)


def read_options(given: Mapping[str, Any]) -> Options:
    """Options from a recipe and a config file, where they are named, with ``given`` winning over both.

    Raises:
        UsageError: an option is unknown, missing or of the wrong type.
    """
    merged = dict(given)
    if given.get("config") is not None:
        merged = _over(_read_config(Path(given["config"])), given)
    # A field cannot be called json, which pydantic has taken: its alias is.
    if "json_" in merged:
        merged["json"] = merged.pop("json_")
    known = {field.alias or name for name, field in Options.model_fields.items()}
    for name in merged:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"There is no option '{name}'.{f' Did you mean {near[0]}?' if near else ''} "
                "compress run --help lists them."
            )
    for needed in ("teacher", "student"):
        if not merged.get(needed):
            raise UsageError(
                f"--{needed} is missing; name a timm model, as in --{needed} {_EXAMPLES[needed]}."
            )
    if merged.get("recipe"):
        teachers = [merged["teacher"]] if isinstance(merged["teacher"], str) else merged["teacher"]
        merged = _over(recipes.load(str(merged["recipe"])).for_pair(teachers, merged["student"]), merged)
    try:
        return Options.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{flag(name)} {first['input']}: {reason}.") from error


_EXAMPLES = {"teacher": "resnet50", "student": "mobilenetv2"}


def flag(name: str) -> str:
    """An option's name on the command line."""
    return {"settings": "--set", "json_": "--json"}.get(name, f"--{name.replace('_', '-')}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = bounded_yaml.read(path)
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds no options; write one 'name: value' a line.")
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = {"set": "settings"}.get(str(key), str(key).replace("-", "_"))
        if name in found:
            raise UsageError(f"--config {path} says {name} twice; leave one of them out.")
        if name in _OF_THE_COMMAND:
            raise UsageError(f"--config {path}: {name} is said on the command line alone; leave it out.")
        if value is not None:
            found[name] = value
    return found


_OF_THE_COMMAND = ("config", "json", "json_")


_PARTS = {
    "optimizer": ("lr", "teacher_lr", "qat_lr"),  # a plain SGD's rates are many times an adaptive one's
    "qat": ("qat_epochs", "qat_lr"),
    "data": ("data_dir", "download"),
    "crop": ("crop_scale", "pad", "pad_mode"),
    "schedule": ("milestones",),
    "weight": ("balance",),  # chosen by whether a weight was asked for
    "method": ("cache_views", "cache_top"),
}
"""Options that belong to one choice of another."""


def _over(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A config's options with the given ones winning, of settings and losses' weights each for itself."""
    # What belongs to the config's choice has no use with another one.
    other = [one for one in _PARTS if one in given and one in config and given[one] != config[one]]
    aside = {part for choice in other for part in _PARTS[choice]}
    if any(_weighs(str(one).partition("=")[0].strip()) for one in given.get("settings", ())):
        aside.add("balance")
    merged = {**{name: value for name, value in config.items() if name not in aside}, **given}
    named = [name.strip() for name in str(given.get("method", "")).split("+")]
    for name in ("settings", "weight"):
        kept, more = config.get(name), given.get(name, {})
        malformed = isinstance(more, list) and not all("=" in str(one) for one in more)
        if not isinstance(kept, Mapping) or malformed:
            continue  # told when the options are checked
        if "method" in given:  # what was set for another method has no use here
            kept = {key: value for key, value in kept.items() if key.split(".")[0] in (*named, "ce")}
        merged[name] = {**kept, **pairs(more)}
    return merged


def _weighs(setting: str) -> bool:
    """Whether a setting, METHOD.KEY, is a weight of a method's loss."""
    method, _, key = setting.partition(".")
    return method in methods.list_methods() and key in methods.load(method).weights


def hashed(options: Options) -> dict[str, Any]:
    """The options that change a stage's result; of a weights file its content counts, not its place."""
    values = {name: value for name, value in options.model_dump(mode="json").items() if enters(name)}
    return {
        **values,
        "teacher_weights": [_content(source) for source in options.teacher_weights],
        "student_weights": _content(options.student_weights),
    }


def _config(options: Options, images: ImageSet) -> dict[str, Any]:
    return {**hashed(options), "data_content": images.fingerprint}


def _content(source: str) -> str:
    return source if source in ("auto", "none") else f"sha256 {sha256(Path(source))}"


def _run(
    options: Options,
    given: frozenset[str],
    images: ImageSet,
    device: str,
    display: Display,
    ranks: Ranks,
) -> Report:
    assert options.out is not None
    folder = RunFolder(options.out, writes=ranks.is_main)
    with folder.locked():
        return _stages(options, given, images, folder, device, display, ranks)


def _stages(
    options: Options,
    given: frozenset[str],
    images: ImageSet,
    folder: RunFolder,
    device: str,
    display: Display,
    ranks: Ranks,
) -> Report:
    from ..stages import report, stage_run

    config = _config(options, images)
    with ranks.main_first():
        # Processes that torchrun has restarted go on.
        folder.open(fresh=options.fresh and not main_process.attempt())
        folder.refuse_other_options(config)
        folder.begin(config, _repeatable(options), command())
        check_weights(options, images, folder.left(options.until), download=True)
    trains = any(rounds.kind(stage) in (*TRAINING, "qat") for stage in folder.left(options.until))
    if (options.tensorboard or options.track) and not trains:
        display.note("there are no curves to send: nothing is left to train")
    with display.stage("start") as progress:
        job = Job(
            options, given, images, folder, Cache(options.cache), display, device, progress, ranks=ranks
        )
        for stage in folder.asked(options.until):
            if rounds.kind(stage) not in TOGETHER and ranks.count > 1:
                leave()
                if not ranks.is_main:
                    return report.assemble(folder)
                job.ranks = ranks = Ranks()
            progress.name, job.round = stage, rounds.number(stage)
            key = folder.key(stage, _entering(stage, config))
            done = ranks.share(folder.finished(stage, key) if ranks.is_main else None)
            if done is not None:
                display.done(stage, done.summary, None)
                continue
            _do(stage, key, stage_run(stage), job)
            if ranks.is_main:
                report.write(folder)
    return report.write(folder) if ranks.is_main else report.assemble(folder)


def _do(stage: str, key: str, run: Callable[[Job], StageResult], job: Job) -> None:
    from ..stages.report import tools_here

    started = time.perf_counter()
    job.key = key
    job.display.warnings.clear()
    if job.ranks.is_main or rounds.kind(stage) in TRAINING:
        done = run(job)
    if job.ranks.is_main:
        seconds = time.perf_counter() - started
        job.folder.record["tools"] = tools_here()
        job.folder.finish(stage, key, done, seconds, job.display.warnings)
        job.folder.drop_checkpoints(stage)
        job.display.done(stage, done.summary, seconds)
    job.folder.record = job.ranks.share(job.folder.record)


def _repeatable(options: Options) -> dict[str, Any]:
    """What config.yaml holds: the job, not where it was written or how it was watched."""
    apart = {"out", "config"} | {name for name in Options.model_fields if group(name) == "Running"}
    return options.model_dump(mode="json", exclude=apart - {"precision"})


def _entering(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    stages = ("prepare", "student") if rounds.kind(stage) == rounds.ROUND else (stage,)
    return {
        name: value
        for name, value in config.items()
        if (enters(name) if name in Options.model_fields else "teacher") in stages
    }
