"""`compress run` and `compress export`: check the options, then run or estimate the missing stages."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...export.runtime import allowed_cores, height_width
from ...models.build import show_size
from ...models.catalog import Entry, describe
from ..config.options import Options, get_flag, get_group, get_stage
from ..config.stages import BASELINE, ROUND, get_kind
from ..data.dataset import ImageSet
from ..data.training_data import TrainingData
from ..errors import UsageError
from ..report.format import plural
from ..runs import process
from ..runs.cache import Cache
from ..runs.console import Display
from ..runs.device import choose_device, fix_threads, select_kernels, threads, use_threads
from ..runs.files import DIGITS, check_outside_data, command_line, describe_namesake
from ..runs.folder import RunFolder, read_config
from ..runs.hashes import sha256
from ..runs.process import STOP
from ..runs.results import Report
from ..tasks import task_of
from ..training.context import RunContext
from ..training.distributed import Ranks, check_ranks, join, leave
from ..training.weights import check_weights
from .options import read_options
from .resolve import resolve

STEP = 3.0
"""Cost of a training step in forward passes: one forward, two backward."""

EFFICIENCY = 0.3
"""Rough throughput of a network in training as a fraction of that of one large convolution."""

WEIGHT_COPIES = 5
"""The teacher's weights, its ONNX file, and a checkpoint with the optimizer's two moments."""

TRAINING = ("teacher", ROUND, "student")
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
    """Distill, export, quantize and measure a student, as ``compress run`` does.

    Args:
        teacher: timm name of the teacher, or several.
        student: timm name of the student.
        data: a folder, a timm data set name, or ``digits``.
        options: any of :class:`~questpress.pipeline.config.options.Options`; ``config`` names a YAML
            file of them.

    Returns:
        The content of ``report.json``.

    Raises:
        UsageError: an option is wrong (``exit_code`` 2).
        JobError: the job was started and failed (``exit_code`` 1). Errors of models and export likewise.
    """
    given = {"teacher": teacher, "student": student, "data": data, **options}
    with STOP.handle_signals():
        ranks = join()
        try:
            chosen = read_options({key: value for key, value in given.items() if value is not None})
            display = Display(quiet=chosen.quiet or not ranks.is_main, verbose=chosen.verbose)
            with STOP.limit_time(chosen.time_limit), display.show_logs():
                return _compress(chosen, ranks, display)
        except BaseException:
            process.is_first_to_exit()  # decided before the other processes notice that this one is gone
            raise
        finally:
            leave()


def export(folder: str | Path, **options: Any) -> Report:
    """Run the stages from export on with other options of export; teacher and student are kept.

    Raises:
        UsageError: the folder is not a run, its student is not finished, or other options are given.
    """
    run = RunFolder.read(Path(folder))
    if "student" not in run.record.stages:
        raise UsageError(
            f"The student of {folder} is not finished. Run the original command again without --until "
            f"({run.record.command})."
        )
    read_config(run.path)  # refuse an edited file
    return compress(config=run.path / "config.yaml", out=run.path, **options)


def _compress(given: Options, ranks: Ranks, display: Display) -> Report:
    if given.quiet and given.verbose:
        raise UsageError("--quiet and --verbose cannot be used together.")
    with display.stage("start") as stage, ranks.main_first():  # fills the cache
        chosen, images = resolve(given, partial(stage.update, "reading images", unit="images"))
    assert chosen.out is not None
    for images_folder in (chosen.data, chosen.unlabeled or chosen.data):
        check_outside_data(images_folder, {"--out": chosen.out})
    device = choose_device(chosen.device, ranks.local_rank if ranks.count > 1 else None)
    check_ranks(chosen, ranks, len(images.train), device)
    if chosen.data == DIGITS:
        display.print(
            "Using the built-in handwritten digits (1,797 images). Set --data to a folder of class folders "
            "to use your own images."
        )
    for note in images.notes:
        display.note(note)
    if "data" in given.model_fields_set and (namesake := describe_namesake(chosen.data)) is not None:
        display.note(namesake)
    if given.batch_size and chosen.batch_size != given.batch_size:
        display.note(
            f"--batch-size {given.batch_size} exceeds the number of images: all images are one batch"
        )
    step = round((chosen.batch_size or 0) * (1 + (chosen.unlabeled_ratio or 0)))
    if chosen.micro_batch and chosen.micro_batch > step:
        display.note(f"--micro-batch {chosen.micro_batch} exceeds a step of {step} images")
    longest = max(chosen.epochs or 0, chosen.teacher_epochs or 0)
    if late := [str(epoch) for epoch in chosen.milestones or () if epoch >= longest]:
        epochs = plural(longest, "epoch")
        display.note(f"no effect of --milestones {', '.join(late)}: the training has {epochs}")
    defaults = [
        f"{get_flag(name)} {value}"
        for name, value in _select_repeatable(chosen).items()
        if name not in given.model_fields_set and value not in (None, [], {}, False)
    ]
    display.detail(f"defaults: {', '.join(defaults)}")
    if chosen.dry_run:
        return dry_run(chosen, _config(chosen, images), images, device, display)
    folder = RunFolder(chosen.out, writes=ranks.is_main)
    with folder.locked(), fix_threads(chosen.threads), select_kernels(chosen.deterministic):
        set_options = frozenset(given.model_fields_set)
        return _run_stages(chosen, set_options, images, folder, device, display, ranks)


def _config(options: Options, images: ImageSet) -> dict[str, Any]:
    """Return the options that change a stage's result, with the checksums of weights files and data."""
    values = {name: value for name, value in options.model_dump(mode="json").items() if get_stage(name)}
    return {
        **values,
        "teacher_weights": [_identify_weights(source) for source in options.teacher_weights],
        "student_weights": _identify_weights(options.student_weights),
        "data_content": images.fingerprint,
        "unlabeled_content": images.unlabeled_fingerprint,
    }


def _identify_weights(source: str) -> str:
    return source if source in ("auto", "none") else f"sha256 {sha256(Path(source))}"


def _run_stages(
    options: Options,
    set_options: frozenset[str],
    images: ImageSet,
    folder: RunFolder,
    device: str,
    display: Display,
    ranks: Ranks,
) -> Report:
    from ..report.assemble import assemble
    from ..report.run_report import LiveReport, write

    config = _config(options, images)
    with ranks.main_first():
        # Processes restarted by torchrun resume.
        folder.open(fresh=options.fresh and not process.count_restarts())
        folder.check_options(config)
        folder.record.threads = threads()
        folder.begin(config, _select_repeatable(options), command_line())
        check_weights(options, images, folder.unfinished(options.until), download=True)
    trains = any(
        get_kind(stage) in (*TRAINING, "qat", BASELINE) for stage in folder.unfinished(options.until)
    )
    if (options.tensorboard or options.track) and not trains:
        display.note("no curves are logged: all trainings are finished")
    with display.stage("start") as progress:
        context = RunContext(
            options=options,
            set_options=set_options,
            task=task_of(images),
            dataset_name=images.name,
            num_classes=len(images.classes),
            gray_bits=images.gray_bits,
            folder=folder,
            cache=Cache(options.cache),
            display=display,
            progress=progress,
            device=device,
            ranks=ranks,
            write_report=LiveReport(folder),
        )
        show = partial(progress.update, unit="images")
        data = TrainingData(options, images, context.cache, device, show, context.place)
        for stage in folder.stages_until(options.until):
            if get_kind(stage) not in TOGETHER and ranks.count > 1:
                leave()
                if not ranks.is_main:
                    return assemble(folder)
                ranks = Ranks()
                context = replace(context, ranks=ranks)
            key = folder.key(stage, _select_options(stage, config))
            done = ranks.broadcast(folder.finished(stage, key) if ranks.is_main else None)
            if done is not None:
                display.done(stage, done.summary, None)
                continue
            _run_stage(context.for_stage(stage, key), data)
            process.return_freed_memory()
            if ranks.is_main:
                write(folder)
    return write(folder) if ranks.is_main else assemble(folder)


def _run_stage(context: RunContext, data: TrainingData) -> None:
    from ..report.assemble import tool_versions_here
    from ..stages import load_stage

    started = time.perf_counter()
    stage, folder, ranks = context.stage, context.folder, context.ranks
    context.display.warnings.clear()
    facts = folder.facts()
    if get_kind(stage) != "teacher":
        data.skipped_names = frozenset(name for name, _ in facts["data"].get("skipped", ()))
    if ranks.is_main or get_kind(stage) in TRAINING:
        result = load_stage(stage)(context, data, facts)
    if ranks.is_main:
        seconds = time.perf_counter() - started
        folder.record.tools = tool_versions_here()
        folder.finish(stage, context.key, result, seconds, context.display.warnings)
        folder.remove_checkpoints(stage)
        context.display.done(stage, result.summary, seconds)
    folder.record = ranks.broadcast(folder.record)


def _select_repeatable(options: Options) -> dict[str, Any]:
    """Return the options for config.yaml: those that describe the job, not its output or execution."""
    excluded = {"out", "config"} | {name for name in Options.model_fields if get_group(name) == "Execution"}
    return options.model_dump(mode="json", exclude=excluded - {"precision"})


def _select_options(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    stages = ("prepare", "student") if get_kind(stage) == ROUND else (stage,)
    of_content = {"unlabeled_content": "prepare"}  # the teachers are trained without
    return {
        name: value
        for name, value in config.items()
        if (get_stage(name) if name in Options.model_fields else of_content.get(name, "teacher")) in stages
    }


def dry_run(
    options: Options, config: Mapping[str, Any], images: ImageSet, device: str, display: Display
) -> Report:
    """Do the checks of a run before its first stage, and print an estimate. Nothing is written.

    Raises:
        UsageError, JobError: see ``RunFolder.check``.
        ModelError: published weights do not exist or cannot be downloaded.
    """
    assert options.out is not None
    folder = RunFolder(options.out)
    folder.check(config, fresh=options.fresh)
    stages = folder.unfinished(options.until)
    check_weights(options, images, stages, download=False)
    for line in estimate(options, images, device, stages):
        display.print(line)
    return Report(
        title="dry run",
        command=command_line(),
        method=options.method,
        image_size=options.image_size or 0,
        config=options.model_dump(mode="json"),
    )


def estimate(options: Options, data: ImageSet, device: str, stages: Sequence[str]) -> Sequence[str]:
    """Return lines on what these stages would train, for how long, and with how much disk space."""
    assert options.image_size and options.epochs and options.teacher_epochs
    train, size = len(data.train), options.image_size
    student_size = options.student_size or size
    teachers = [describe(name, size) for name in options.teacher]
    student = describe(options.student, student_size)
    lines = [
        f"{data.name}: {len(data.classes)} classes{task_of(data).labels_note}; {train} train, "
        f"{len(data.val)} val, {len(data.test)} test images"
        + (f", {len(data.unlabeled)} without labels" if data.unlabeled else "")
        + f", at {show_size(size)} px",
    ]
    macs = 0.0
    named = zip(teachers, options.teacher_weights, options.teacher_head, strict=True)
    for teacher, weights, head in named if "teacher" in stages else ():
        how = "without its head and not trained"
        if head != "none":
            start = "trained from scratch" if weights == "none" else "fine-tuned unless its head fits,"
            how = f"{start} for {plural(options.teacher_epochs, 'epoch')}"
            macs += STEP * (teacher.gmacs or 0.0) * train * options.teacher_epochs
        lines.append(f"teacher {_describe_size(teacher)}, {how}")
    distilling = sum(teacher.gmacs or 0.0 for teacher in teachers) if options.method != "none" else 0.0
    own = student.gmacs or 0.0
    seen = train * (1 + (options.unlabeled_ratio or 0.0))
    if "student" in stages:
        # In each further round a student is the teacher.
        per_image = STEP * own + distilling + (options.rounds - 1) * (STEP + 1) * own
        macs += per_image * seen * options.epochs
        lines.append(
            f"student {_describe_size(student)} at {show_size(student_size)} px, "
            f"{plural(options.epochs, 'epoch')} with method {options.method}"
            + (f", {options.rounds} rounds" if options.rounds > 1 else "")
        )
    if "qat" in stages:
        assert options.qat_epochs
        macs += (STEP * own + distilling) * seen * options.qat_epochs
        lines.append(f"{plural(options.qat_epochs, 'epoch')} with fake quantization")
    if BASELINE in stages:
        macs += STEP * own * train * options.epochs
        lines.append(f"the same student for {plural(options.epochs, 'epoch')} without the teacher")
    seconds = macs / (EFFICIENCY * measure_convolution(device))
    weight_bytes = sum(4 * network.parameters for network in [*teachers, student])
    disk = WEIGHT_COPIES * weight_bytes + len(data.learned) * 3 * 4 * math.prod(height_width(size))
    lines.append(
        f"about {_format_duration(seconds / 60)} or longer on {device}, about {disk / 1e9:.1f} GB of disk"
    )
    return lines


def _describe_size(network: Entry) -> str:
    return f"{network.name}: {network.parameters / 1e6:.1f} M parameters, {network.gmacs or 0.0:.2f} GMACs"


def measure_convolution(device: str) -> float:
    """Return the throughput of a 3×3 convolution over 256 channels in fp32, in GMACs per second."""
    use_threads(allowed_cores())
    layer = nn.Conv2d(256, 256, 3, padding=1).to(device)
    images = torch.randn(8, 256, 28, 28, device=device)
    macs = 8 * 28 * 28 * 256 * 256 * 9 / 1e9
    with torch.no_grad():
        layer(images).sum().item()
        started, runs = time.perf_counter(), 0
        while time.perf_counter() - started < 0.3:
            layer(images).sum().item()
            runs += 1
    return macs * runs / (time.perf_counter() - started)


def _format_duration(minutes: float) -> str:
    if minutes < 90:
        return plural(max(1, round(minutes)), "minute")
    return f"{minutes / 60:.0f} hours" if minutes < 60 * 48 else f"{minutes / 60 / 24:.0f} days"
