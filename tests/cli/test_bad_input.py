"""Invalid arguments or data give one error message and an exit code, and no file is lost."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image as PillowImage
from questpress.pipeline.api.options import merge_options, read_options

from tests.support import little
from tests.support.little import CLASSES, NETWORKS, SMALL, compress, files, job, photos, refused, report


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--teacher", "resnet5O"], ["resnet5O", "resnet50"]),
        (["--student", "mobilnetv2"], ["mobilnetv2", "mobilenetv2"]),
        (["--student", "no_network_at_all_xyz"], ["no_network_at_all_xyz"]),
        (["--method", "qest"], ["qest", "Did you mean quest"]),
        (["--method", "quest+quest"], ["'quest' is repeated"]),
        (["--set", "quest.tua=0.2"], ["quest.tua", "Did you mean quest.tau"]),
        (["--set", "dkd.alpha=1"], ["dkd.alpha", "quest"]),
        (["--set", "tau=1"], ["tau=1", "METHOD.KEY=VALUE"]),
        (["--set", "quest.tau"], ["quest.tau", "KEY=VALUE"]),
        (["--set", "quest.tau=warm"], ["quest.tau=warm", "number"]),
        (["--set", "quest.tau=-1"], ["quest.tau=-1", "greater than 0"]),
        (["--set", "quest.words=many"], ["quest.words=many", "integer"]),
        (["--set", "quest.words=1"], ["quest.words=1", "2"]),
        (["--set", "quest.words=769"], ["quest.words=769", "768", "fewer words"]),
        (["--set", "quest.levels=map,vector"], ["quest.levels=vector", "pattern"]),
        (["--set", "quest.levels=map,map"], ["levels must not be repeated"]),
        (["--set", "quest.tau=0.2", "--set", "quest.delta=12"], ["delta has no effect with tau"]),
        (["--set", "quest.words=41", "--set", "quest.features=40"], ["quest.words=41", "40"]),
        (["--set", "quest.words=0.5"], ["quest.words=0.5", "integer"]),
        (
            ["--method", "mimic", "--set", "mimic.variant=l2", "--set", "mimic.bias=mean"],
            ["mimic.bias=mean has no effect"],
        ),
        (["--method", "kd", "--set", "kd.tau=1e300"], ["kd.tau=1e300", "from 1e-30 to 1e+30"]),
        (["--method", "none", "--set", "quest.tau=1"], ["quest.tau=1", "(none)"]),
        (["--weight", "dkd=1"], ["--weight dkd=1", "quest, ce"]),
        (["--method", "kd", "--weight", "quest=1"], ["--weight quest=1", "kd, ce"]),
        (["--method", "quest+"], ["there is no method ''"]),
        (["--method", "quest+none"], ["'none' cannot be combined"]),
        (["--recipe", "quest-cifar10"], ["quest-cifar10", "Did you mean quest-cifar100"]),
        (["--weight", "ce=-1"], ["--weight ce=-1", "negative"]),
        (["--weight", "ce=much"], ["--weight", "much"]),
        (["--weight", "ce=0", "--weight", "quest=0"], ["all losses have weight 0"]),
        (["--method", "none", "--weight", "ce=0"], ["all losses have weight 0"]),
        (["--schedule", "multistep"], ["--milestones"]),
        (["--milestones", "1,2", "--schedule", "cosine"], ["multistep"]),
        (["--milestones", "one,2"], ["--milestones", "one"]),
        (["--optimizer", "adamv"], ["adamv", "adam"]),
        (["--device", "tpu"], ["--device", "cuda", "got tpu"]),
        (["--device", "cpu:x"], ["--device", "got cpu:x"]),
        (["--teacher-weights", "auto", "--teacher-weights", "none"], ["2 times for 1 teachers"]),
        (["--crop", "resized", "--pad", "2"], ["--pad", "--crop pad"]),
        (["--crop", "pad", "--crop-scale", "0.5"], ["--crop-scale", "--crop resized"]),
        (["--crop", "pad", "--pad", "16"], ["--pad 16"]),
        (["--epochs", "3", "--warmup-epochs", "3"], ["--warmup-epochs 3", "--epochs 3"]),
        (["--teacher-epochs", "2", "--teacher-warmup-epochs", "5"], ["--teacher-warmup-epochs 5"]),
        (["--epochs", "0"], ["--epochs must be greater than or equal to 1, got 0"]),
        (["--lr", "0"], ["--lr must be greater than 0, got 0"]),
        (["--lr", "nan"], ["--lr must be a finite number, got nan"]),
        (["--weight-decay", "inf"], ["--weight-decay must be a finite number, got inf"]),
        (["--set", "quest.tau=inf"], ["quest.tau=inf", "finite"]),
        (["--weight", "ce=nan"], ["--weight", "finite"]),
        (["--batch-size", "1"], ["--batch-size must be greater than or equal to 2, got 1"]),
        (["--unlabeled-ratio", "0"], ["--unlabeled-ratio must be greater than 0, got 0"]),
        (["--unlabeled-ratio", "2"], ["--unlabeled-ratio 2 requires --unlabeled"]),
        (["--method", "none", "--unlabeled", "x"], ["--unlabeled x has no effect with --method none"]),
        (["--unlabeled", "nowhere"], ["--unlabeled nowhere does not exist"]),
        (["--seed", "-1"], ["--seed must be greater than or equal to 0, got -1"]),
        (["--rounds", "2147483648"], ["--rounds must be less than or equal to 100, got 2147483648"]),
        (["--teachers-from-seeds", "9" * 23], ["--teachers-from-seeds", "less than or equal to 100"]),
        (["--seed", "9" * 23], ["--seed", "at most 4294967295"]),
        (["--epochs", str(2**40)], ["--epochs", "at most 4294967295"]),
        (["--lr", "1e-300"], ["--lr must be 0 or from 1e-30 to 1e+30, got 1e-300"]),
        (["--weight", "ce=1e300"], ["--weight", "from 1e-30 to 1e+30"]),
        (["--set", "quest.tau=1e-300"], ["quest.tau=1e-300", "from 1e-30 to 1e+30"]),
        (["--milestones", "3,2,1"], ["--milestones must be increasing", "got 3,2,1"]),
        (["--milestones", "-1"], ["--milestones must be greater than or equal to 1, got -1"]),
        (["--data-dir", "elsewhere"], ["--data-dir", "has no effect if --data is a folder"]),
        (["--method", "none", "--balance", "auto"], ["--balance auto has no effect with --method none"]),
        (["--quiet", "--verbose"], ["--quiet and --verbose cannot be used together"]),
        (["--download"], ["--download", "has no effect if --data is a folder"]),
        (["--set", "\udcff"], ["--set must be KEY=VALUE, got \\xff"]),
        (["--val-fraction", "1"], ["--val-fraction must be less than 1, got 1"]),
        (["--randaugment", "2"], ["--randaugment must be N,M, the number of operations"]),
        (["--mixup", "-1"], ["--mixup must be greater than or equal to 0, got -1"]),
        (["--cutmix", "nan"], ["--cutmix must be a finite number, got nan"]),
        (["--label-smoothing", "1"], ["--label-smoothing must be less than 1, got 1"]),
        (["--image-size", "4"], ["--image-size must be 8 to 4096 pixels, got 4"]),
        (["--bench-seconds", "0"], ["--bench-seconds must be greater than 0, got 0"]),
    ],
)  # fmt: skip
def test_wrong_option_is_named_before_anything_starts(data, cache, tmp_path, more, words):
    given = list(NETWORKS)
    for option in ("--teacher", "--student", "--teacher-weights"):
        if option in more and option != "--student":
            at = given.index(option)
            del given[at : at + 2]
    result = compress(*given, *SMALL, "--data", data, "--out", tmp_path / "run", "--cache", cache, *more)
    refused(result, 2, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_weights_that_are_a_folder_are_named_with_the_file_that_is_meant(data, tmp_path, whose):
    (tmp_path / "shop").mkdir()
    file = tmp_path / "shop" / f"{whose}.safetensors"
    given = (
        "--teacher", little.TEACHER, "--student", little.STUDENT, *SMALL, "--data", data,
        "--out", tmp_path / "run", f"--{whose}-weights", tmp_path / "shop",
    )  # fmt: skip
    prefix = f"--{whose}-weights {tmp_path / 'shop'} is a folder. "
    refused(compress(*given), 2, f"{prefix}Set it to auto, none or a file.")
    file.touch()
    refused(compress(*given), 2, f"{prefix}Set it to a file in it, such as {file}.")


@pytest.mark.parametrize(
    "more",
    [
        ["--epochs", "many"],
        ["--schedule", "linear"],
        ["--until", "nowhere"],
        ["--epoch", "3"],
        ["--nonsense"],
        ["--out", ""],
        ["--out="],
    ],
)
def test_usage_errors_of_click_exit_with_2(more):
    result = compress(*NETWORKS, *more)
    assert result.exit_code == 2 and "Error" in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(("given", "missing"), [((), "teacher"), (("--teacher", "resnet18"), "student")])
def test_missing_teacher_or_student_is_refused(given, missing):
    refused(compress("run", *given), 2, f"--{missing} is missing", "timm")


def test_known_and_unknown_commands():
    assert compress("nonsense").exit_code == 2
    refused(compress("models", "mobilenetv2_10O"), 2, "mobilenetv2_100")


# The config file.


def config(tmp_path: Path, text: str) -> Path:
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", ["'epoch'", "Did you mean"]),
        ("- a\n- b", ["does not contain options"]),
        ("just text", ["does not contain options"]),
        ("", ["does not contain options"]),
        ("a: [1", ["not valid YAML"]),
        ("epochs: many", ["--epochs must be a valid integer", "got many"]),
        ("seed: [1, 2]", ["--seed"]),
        ("settings: {quest.tua: 1}", ["quest.tua", "quest.tau"]),
        ("set: {quest.tua: 1}", ["quest.tua", "quest.tau"]),
        ("epochs: yes", ["--epochs must not be yes or no, got True"]),
        ("epochs: 1\nepochs: 5", ["'epochs' twice"]),
        ("batch-size: 4\nbatch_size: 8", ["batch_size twice"]),
        ("json: true", ["json can only be set on the command line"]),
        ("config: other.yaml", ["config can only be set on the command line"]),
        ('cache: "\\ud800"', ["--cache must not contain half a character", "got \\ud800"]),
        ("settings: 3", ["--set must", "got 3"]),
        ("teacher: {a: 1}", ["--teacher"]),
        ("data: 5", ["--data must", "got 5"]),
    ],
)
def test_wrong_config_is_refused(data, tmp_path, text, words):
    given = [] if text.startswith("teacher") else ["--teacher", little.TEACHER]
    where = [] if text.startswith("data") else ["--data", data]
    files = ("--out", tmp_path / "run", "--config", config(tmp_path, text))
    refused(compress(*given, "--student", little.STUDENT, *where, *files), 2, *words)
    assert not (tmp_path / "run").exists()


def test_on_and_off_of_a_config_are_the_words(tmp_path):
    file = config(tmp_path, "balance: off\ncompile: on\nqat: yes")
    options = read_options({"teacher": "resnet18", "student": "resnet18", "config": file})
    assert (options.balance, options.compile, options.qat) == ("off", "on", True)


def test_randaugment_of_a_recipe_can_be_switched_off(tmp_path):
    recipe = {"teacher": "resnet50", "student": "resnet18", "recipe": "cqkd-imagenet"}
    assert read_options(recipe).randaugment == [2, 9]
    options = read_options({**recipe, "randaugment": "0"}).model_dump(mode="json")
    again = config(tmp_path, yaml.safe_dump({name: options[name] for name in (*recipe, "randaugment")}))
    assert options["randaugment"] == read_options({"config": again}).randaugment == 0


def test_config_that_is_not_there_or_not_text_is_refused(tmp_path):
    refused(compress(*NETWORKS, "--config", tmp_path / "none.yaml"), 2, "none.yaml", "No such file")
    refused(compress(*NETWORKS, "--config", tmp_path), 2, "cannot be read")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    refused(compress(*NETWORKS, "--config", tmp_path / "bytes.yaml"), 2, "bytes.yaml", "not valid YAML")


def test_config_may_name_options_as_the_command_line_does(data, cache, tmp_path):
    text = yaml.safe_dump({"teacher": little.TEACHER, "teacher-weights": "none", "student": little.STUDENT,
                           "image-size": 16, "teacher-epochs": 1, "data": str(data)})  # fmt: skip
    result = compress(
        "--config", config(tmp_path, text), "--out", tmp_path / "run", "--cache", cache, "--until", "teacher"
    )
    assert result.exit_code == 0, result.output


# The data folder.


def train_teacher(tmp_path: Path, cache: Path, data: Path, *more: str):
    return job(data, tmp_path / "run", cache, "--until", "teacher", *more)


def test_few_unreadable_images_are_skipped_and_listed_in_the_report(cache, tmp_path):
    data = photos(tmp_path / "photos", dict.fromkeys(CLASSES, 100))
    (data / "red" / "text.jpg").write_text("this is no image")
    whole = (data / "blue" / "000.png").read_bytes()
    (data / "blue" / "half.png").write_bytes(whole[: len(whole) // 2])
    (data / "green" / "empty.jpg").touch()
    result = little.check_success(train_teacher(tmp_path, cache, data))
    assert "3 files were skipped; the report has the list" in result.stderr
    summary = report(tmp_path / "run")["data"]
    skipped = dict(map(tuple, summary["skipped"]))
    assert set(skipped) == {"red/text.jpg", "blue/half.png", "green/empty.jpg"}
    assert all(skipped.values())
    # Of the 302 that are not empty two cannot be read, and none of these is counted.
    assert summary["train"] + summary["val"] + summary["test"] == 300
    for role in ("train", "val", "test"):
        assert sum(summary["per_class"][role].values()) == summary[role]
    assert any("skipped" in line for line in report(tmp_path / "run")["warnings"])


def test_too_many_unreadable_images_stop_the_job_and_the_first_five_are_named(cache, tmp_path):
    data = photos(tmp_path / "photos", dict.fromkeys(CLASSES, 30))
    for number in range(7):
        (data / "red" / f"text{number}.jpg").write_text(f"no image {number}")
    line = refused(train_teacher(tmp_path, cache, data), 1, "7 of 97", "1%", "and 2 more")
    for number in range(5):
        assert f"text{number}.jpg" in line
    assert not (tmp_path / "run/teacher.safetensors").exists()


# The run folder.


def test_out_may_not_be_a_file(data, cache, tmp_path):
    (tmp_path / "run").write_text("precious")
    refused(job(data, tmp_path / "run", cache), 2, "is a file")
    assert (tmp_path / "run").read_text() == "precious"
    refused(job(data, tmp_path / "run" / "inside", cache), 2, "inside", "cannot be written")


def test_out_may_not_hold_other_files(data, cache, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    refused(job(data, tmp_path / "run", cache), 2, "contains other files")
    refused(job(data, tmp_path / "run", cache, "--fresh"), 2, "contains other files")
    assert files(tmp_path / "run").keys() == {"thesis.txt"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_out_must_be_writable(data, cache, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(job(data, tmp_path / "locked" / "run", cache), 2, "cannot be written", "Permission denied")


# Milestones and warm-up as they should be.


@pytest.mark.parametrize(
    "more",
    [
        ("--schedule", "multistep", "--milestones", "1,2", "--crop", "center", "--no-flip"),
        (
            *("--milestones", "1", "--pad", "0", "--warmup-epochs", "0.5", "--teacher-warmup-epochs", "0"),
            *("--batch-size", "1000", "--set", "quest.levels=map,map@1", "--set", "quest.tau=0.2"),
        ),
        (
            *("--schedule", "constant", "--warmup-epochs", "0", "--pad-mode", "reflect", "--flip"),
            *("--optimizer", "sgd", "--decay-all", "--label-smoothing", "0.1", "--weight", "ce=0.5"),
        ),
        ("--crop", "resized", "--crop-scale", "0.5", "--color-jitter", "0.3", "--precision", "bf16"),
        ("--randaugment", "2,20", "--erasing", "0.5", "--mixup", "1", "--cutmix", "1", "--cache-views", "2"),
    ],
)
def test_related_options_train_together(data, cache, tmp_path, more):
    result = job(
        data, tmp_path / "run", cache, "--epochs", "1", "--teacher-epochs", "1", "--until", "student", *more
    )
    assert result.exit_code == 0, result.output
    content = report(tmp_path / "run")
    assert all(np.isfinite(e["losses"]["loss"]) for e in content["epochs"]) and len(content["epochs"]) == 2


def test_networks_near_chance_are_reported(cache, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("p", "q"):  # the pictures of both classes are noise
        (tmp_path / "noise" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            PillowImage.fromarray(pixels).save(tmp_path / "noise" / name / f"{number}.png")
    short = ("--teacher-epochs", "1", "--epochs", "1", "--until", "validate")
    little.check_success(job(tmp_path / "noise", tmp_path / "run", cache, *short))
    [note] = [warning for warning in report(tmp_path / "run")["warnings"] if "chance" in warning]
    assert "50.0 %, the fraction of the largest class" in note


def test_dependent_defaults_of_a_config_are_resolved_again():
    config = {"optimizer": "adamw", "lr": 0.0028, "balance": "auto", "crop": "pad", "pad": 2}
    config |= {"qat": True, "qat_epochs": 2}
    assert merge_options(config, {"optimizer": "sgd"}).get("lr") is None
    assert merge_options({"lr": 0.1, "qat_epochs": 2}, {"optimizer": "sgd", "qat": True}).items() >= {
        ("lr", 0.1), ("qat_epochs", 2)
    }  # fmt: skip
    assert merge_options(config, {"optimizer": "adamw"})["lr"] == 0.0028
    assert merge_options(config, {"settings": ["quest.alpha=5"]}).get("balance") is None
    assert merge_options(config, {"settings": ["quest.tau=5"]})["balance"] == "auto"
    without = merge_options(config, {"qat": False})
    assert without["qat"] is False and "qat_epochs" not in without
    assert merge_options(config, {"crop": "pad"})["pad"] == 2


def test_batch_larger_than_the_data_scales_the_learning_rate(data, cache, tmp_path):
    folders = ("--data", data, "--cache", cache, "--out", tmp_path / "run")
    arguments = (*NETWORKS, *SMALL, *folders, "--randaugment", "0", "--dry-run", "--json")
    large, all_of_it = (compress(*arguments, "--batch-size", size) for size in ("1000000", "45"))
    assert "all images are one batch" in large.stderr and "all images" not in all_of_it.stderr
    configs = [json.loads(result.stdout)["config"] for result in (large, all_of_it)]
    rates, sizes = ([options[name] for options in configs] for name in ("lr", "batch_size"))
    assert configs[0]["randaugment"] is None, "the same run as without the option"
    assert rates[0] == pytest.approx(2.8e-3 * (sizes[0] / 64) ** 0.5, abs=1e-6) and sizes[0] < 60


def test_student_that_no_file_holds_is_refused_before_it_is_trained(data, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("questpress.pipeline.api.resolve.MAX_EMBEDDED_BYTES", 10_000)
    refused(job(data, tmp_path / "run", cache), 2, "--student cifar_resnet8", "2 GB")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_outputs_inside_the_data_folder_are_refused(tmp_path, cache, option):
    data = photos(tmp_path / "photos")
    places = {"--out": tmp_path / "run", "--cache": cache, option: data / "mine"}

    def build_arguments(places: dict[str, Path], images: str = "--data") -> list[str | Path]:
        return [*NETWORKS, *SMALL, images, data, *(part for pair in places.items() for part in pair)]

    refused(compress(*build_arguments(places)), 2, f"{option} {data / 'mine'}", "would be read as images")
    refused(compress(*build_arguments(places), "--dry-run"), 2, "would be read as images")
    assert not (data / "mine").exists() and not (tmp_path / "run").exists()
    refused(compress(*build_arguments(places, "--unlabeled")), 2, "would be read as images")
    hidden = {**places, option: data / ".mine"}
    assert compress(*build_arguments(hidden), "--dry-run").exit_code == 0


def test_out_of_memory_is_reported(data, cache, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr("questpress.pipeline.stages.export.export_onnx", full)
    refused(job(data, tmp_path / "run", cache), 1, "out of memory", "--image-size")
