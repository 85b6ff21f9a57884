"""The papers' recipes: their settings, their networks, and the options that override them."""

import json
from pathlib import Path

import pytest
from questpress.pipeline import methods
from questpress.pipeline.api.options import read_options
from questpress.pipeline.api.resolve import resolve
from questpress.pipeline.config import recipes
from questpress.pipeline.errors import UsageError
from questpress.pipeline.methods.base import Setup, Shapes

from tests.support import little

PAIRS = {
    "cifar_resnet56": "cifar_resnet20",
    "cifar_wrn_40_2": "cifar_shufflenetv1",
    "cifar_vgg13": "cifar_vgg8",
    "cifar_resnet50": "cifar_mobilenetv2_half",
}


def options(recipe: str, teacher: str = "cifar_resnet56", student: str = "cifar_resnet20", **given: object):
    return read_options({"recipe": recipe, "teacher": teacher, "student": student, **given})


@pytest.mark.parametrize("name", recipes.list_recipes())
@pytest.mark.parametrize("teacher", PAIRS)
def test_every_recipe_makes_valid_options_for_every_pair(name: str, teacher: str) -> None:
    chosen = options(name, teacher, PAIRS[teacher])
    methods.parse_parameters(methods.parse_methods(chosen.method), chosen.settings)
    assert (chosen.val_fraction, chosen.balance, chosen.decay_all) == (0, "off", name != "dist-imagenet")
    # timm's sgd has Nesterov momentum, as the authors of QuEST and, on ImageNet, of DIST have it.
    nesterov = ("quest-cifar100", "quest-imagenet", "dist-imagenet")
    assert chosen.optimizer == {"cqkd-imagenet": "adamw"}.get(name, "sgd" if name in nesterov else "momentum")
    assert chosen.student_weights == "none"  # the papers' students start from scratch


def test_quest_on_cifar_is_the_papers_recipe() -> None:
    chosen = options("quest-cifar100")
    assert (chosen.method, chosen.epochs, chosen.batch_size, chosen.optimizer) == ("quest", 240, 64, "sgd")
    assert (chosen.lr, chosen.milestones, chosen.schedule) == (0.05, [150, 180, 210], "multistep")
    assert (chosen.weight_decay, chosen.warmup_epochs, chosen.label_smoothing) == (5e-4, 0, 0)
    assert (chosen.crop, chosen.pad, chosen.pad_mode, chosen.flip) == ("pad", 4, "reflect", True)
    quest = methods.parse_parameters(["quest"], chosen.settings)["quest"].model_dump()
    assert (quest["tau"], quest["words"], quest["alpha"], quest["gamma"]) == (0.2, 4096, 1, 3)
    assert quest["iterations"] == 20


@pytest.mark.parametrize(
    ("recipe", "teacher", "student", "name", "value"),
    [
        ("quest-cifar100", "cifar_resnet50", "cifar_mobilenetv2_half", "lr", 0.01),
        ("quest-cifar100", "cifar_resnet32x4", "cifar_shufflenetv2", "lr", 0.01),
        ("quest-cifar100", "cifar_vgg13", "cifar_vgg8", "quest.alpha", 2),
        ("quest-cifar100", "cifar_vgg13", "cifar_mobilenetv2_half", "quest.alpha", 1),
        ("quest-cifar100", "cifar_resnet50", "cifar_vgg8", "quest.alpha", 1),
        ("quest-cifar100", "cifar_resnet56", "own_network", "lr", 0.05),
        ("dkd-cifar100", "cifar_resnet56", "cifar_resnet20", "dkd.beta", 2),
        ("dkd-cifar100", "cifar_wrn_40_2", "cifar_wrn_16_2", "dkd.beta", 6),
        ("dkd-cifar100", "cifar_resnet32x4", "cifar_resnet8x4", "dkd.beta", 8),
        ("dkd-cifar100", "cifar_wrn_40_2", "cifar_shufflenetv1", "dkd.beta", 8),
        ("sdd-cifar100", "cifar_wrn_40_2", "cifar_shufflenetv1", "sdd.finest", 4),
        ("sdd-cifar100", "cifar_resnet56", "cifar_resnet20", "sdd.finest", 2),
        ("mimic-cifar100", "cifar_wrn_40_2", "cifar_wrn_16_2", "mimic.beta", 6),
        ("mimic-cifar100", "cifar_vgg13", "cifar_vgg8", "mimic.hashes", 32 * 512),
        ("mimic-cifar100", "cifar_resnet50", "cifar_vgg8", "mimic.hashes", 32 * 2048),
        ("mimic-imagenet", "resnet34", "resnet18", "mimic.beta", 5),
        ("quest-imagenet", "resnet50", "mobilenetv1_100", "batch_size", 210),
        ("quest-imagenet", "resnet34", "resnet18", "batch_size", 256),
    ],
)
def test_pairs_that_the_paper_treats_differently_are(
    recipe: str, teacher: str, student: str, name: str, value: float | str
) -> None:
    chosen = options(recipe, teacher, student)
    actual = chosen.settings[name] if "." in name else getattr(chosen, name)
    assert actual == value


def test_given_options_override_the_recipe() -> None:
    chosen = options("quest-cifar100", lr=0.2, settings=["quest.tau=0.5"], method="quest+kd")
    assert (chosen.lr, chosen.method, chosen.batch_size) == (0.2, "quest+kd", 64)
    assert chosen.settings["quest.tau"] == "0.5" and chosen.settings["quest.words"] == 4096


def test_report_names_recipe_source_and_changes(data: Path, tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "run"
    result = little.job(
        data, run, cache, "--recipe", "quest-cifar100", "--milestones", "1", "--until", "student"
    )
    assert result.exit_code == 0, result.output
    report = json.loads((run / "report.json").read_text())
    assert report["recipe"].startswith("quest-cifar100 (Jain et al., ECCV 2020")
    for change in ("epochs 2", "batch_size 16", "quest.words 8", "milestones [1]"):
        assert change in report["recipe"], report["recipe"]
    assert "lr " not in report["recipe"] and report["config"]["lr"] == 0.05
    assert "Jain et al., ECCV 2020" in (run / "report.md").read_text()


def test_papers_recipes_train_on_all_of_train(data: Path) -> None:
    given = {"recipe": "kd-cifar100", "teacher": little.TEACHER, "student": little.STUDENT, "data": str(data)}
    _, images = resolve(read_options(given))
    assert len(images.val) == 0


WELL = "about: a\nsource: b\noptions: {lr: 0.1}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WELL + "option: {}\n", "unknown key 'option'. Did you mean options?"),
        (WELL.replace("lr", "lrr"), "unknown option 'lrr'. Did you mean lr?"),
        (WELL + "for_students: {'a*': {epoch: 3}}\n", "unknown option 'epoch'. Did you mean epochs?"),
        (WELL + "for_teachers: {'a*': {epoch: 3}}\n", "unknown option 'epoch'. Did you mean epochs?"),
        (WELL.replace("about: a\n", ""), "no 'about'"),
    ],
)
def test_unknown_recipe_key_is_refused(text: str, message: str) -> None:
    assert recipes.parse_recipe("mine", WELL).options == {"lr": 0.1}
    extended = recipes.parse_recipe("mine", WELL + "extends: _crd\n")
    alone = recipes.load_recipe("supervised-cifar100")
    assert {**extended.options, "method": "none"} == {**alone.options, "lr": 0.1}
    assert extended.for_students == alone.for_students
    with pytest.raises(UsageError, match="recipe mine") as refused:
        recipes.parse_recipe("mine", text)
    assert message in str(refused.value)


def test_command_lists_every_recipe_with_its_source() -> None:
    shown = little.compress("recipes")
    assert shown.exit_code == 0
    for name in recipes.list_recipes():
        assert name in shown.stdout and recipes.load_recipe(name).source in shown.stdout


def test_switch_changes_defaults_of_a_recipe() -> None:
    chosen = options("kd-cifar100", settings=["kd.standardize=true"])
    kd = methods.load("kd")
    shapes = Shapes({}, vector=None, logits=3)
    built = kd(methods.parse_parameters(["kd"], chosen.settings)["kd"], Setup(shapes, [shapes], {}))
    assert (built.tau, built.weight) == (2.0, 9.0)


def test_parameter_of_a_recipe_can_be_unset() -> None:
    chosen = options("quest-cifar100", settings=["quest.tau=none", "quest.delta=12"])
    quest = methods.parse_parameters(["quest"], chosen.settings)["quest"].model_dump()
    assert (quest["tau"], quest["delta"]) == (None, 12)


@pytest.mark.parametrize(("epochs", "warmup"), [(240, 20), (30, 3), (5, 1), (1000, 20)])
def test_dkd_warm_up_is_a_fraction_of_the_training(data: Path, epochs: int, warmup: int) -> None:
    given = {"teacher": little.TEACHER, "student": little.STUDENT, "data": str(data), "method": "dkd"}
    resolved, _ = resolve(read_options({**given, "epochs": epochs}))
    assert resolved.settings["dkd.warmup"] == warmup
    explicit, _ = resolve(read_options({**given, "epochs": epochs, "settings": ["dkd.warmup=7"]}))
    assert explicit.settings["dkd.warmup"] == 7


def test_feed_on_cifar_trains_five_teachers_from_seeds() -> None:
    chosen = options("feed-cifar100")
    assert (chosen.method, chosen.teachers_from_seeds, chosen.teacher_weights) == ("feed", 5, ["none"])
    feed = methods.parse_parameters(["feed"], chosen.settings)["feed"].model_dump()
    # 500 times the mean of 4,096 numbers, as in Factor Transfer, is beta times their sum over √4,096.
    assert feed["beta"] * 4096**0.5 == 500
