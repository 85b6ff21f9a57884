"""The default of --method, which depends on networks and weights."""

import pytest
from questpress.pipeline.api.options import choose_method
from questpress.pipeline.config.options import Options


@pytest.mark.parametrize(
    ("changed", "method"),
    [
        ({}, "quest+mimic"),
        ({"student_weights": "none"}, "quest"),
        ({"data": "digits"}, "quest"),
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
