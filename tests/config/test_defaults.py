"""Defaults that depend on networks, weights and the built-in digits."""

import pytest
from questpress.pipeline.api.options import choose_method
from questpress.pipeline.api.resolve import resolve
from questpress.pipeline.config.defaults import choose_learning_rate
from questpress.pipeline.config.options import Options
from timm.optim import list_optimizers


@pytest.mark.parametrize(
    ("changed", "method"),
    [
        ({}, "quest+mimic"),
        ({"student_weights": "none"}, "quest"),
        ({"student": "cifar_resnet8"}, "quest"),  # has no published weights
        ({"student": "cifar_resnet8", "student_weights": "file.safetensors"}, "quest+mimic"),
        ({"teacher": ["resnet18", "resnet34"], "teacher_weights": ["auto"] * 2}, "quest"),
        ({"settings": {"quest.words": "64"}}, "quest+mimic"),
        ({"settings": {"dkd.alpha": "1"}}, "quest"),
        ({"student": "levit_128s", "image_size": 224}, "quest"),  # its classifier is not one linear layer
        ({"student": "retinanet:mobilenetv2_050", "teacher": ["retinanet:resnet18"]}, "mimic"),
        ({"student": "ssdlite:mobilenetv2_050", "teacher": ["retinanet:resnet18"]}, "pkd"),
    ],
)
def test_method_fits_networks_and_weights(changed: dict[str, object], method: str) -> None:
    options = {
        "teacher": ["resnet18"], "student": "mobilenetv2_100", "data": "photos", "image_size": 64,
        "teacher_head": ["auto"] * len(changed.get("teacher", "1")), **changed,
    }  # fmt: skip
    assert choose_method(Options.model_validate(options)) == method


@pytest.mark.parametrize(("teacher", "size"), [("cifar_resnet20", 40), ("vit_tiny_patch16_224", 64)])
def test_digits_are_small_and_learned_from_scratch(teacher: str, size: int) -> None:
    chosen, _ = resolve(Options(teacher=[teacher], student="mobilenetv2_050", dry_run=True))
    assert (chosen.image_size, chosen.epochs, chosen.teacher_epochs) == (size, 15, 4)
    assert (chosen.teacher_weights, chosen.student_weights) == (["none"], "none")
    assert (chosen.method, chosen.crop, chosen.flip, chosen.cache_views) == ("quest", "pad", False, 5)


def test_learning_rate_of_all_forms_of_sgd_is_larger() -> None:
    forms = (
        "sgd", "sgdc", "sgdp", "sgdw", "csgdc", "csgdp", "csgdw", "fusedsgd", "bnbsgd", "bnbsgd8bit",
        "momentum", "nesterov", "nesterovw",
    )  # fmt: skip
    for name in (*forms, "adamw", "cadamw", "bnbadam", "madgrad", "lamb", "lion", "muon", "rmsprop"):
        rate = choose_learning_rate(64, name, "student", scratch=True)
        assert name in list_optimizers() and rate == (0.14 if name in forms else 0.0028)
