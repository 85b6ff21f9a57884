import subprocess
import sys

import pytest
from questpress.models.build import ALIASES, find_nearest, list_architectures, resolve
from questpress.models.catalog import find_matching
from questpress.models.errors import ModelError, UnknownModel


def test_every_alias_stands_for_a_model_that_timm_has_and_is_not_a_name_of_timm_itself():
    names = set(list_architectures())
    assert {target for target in ALIASES.values() if target not in names} == set()
    assert set(ALIASES) & names == set()


def test_short_names_people_type_resolve_to_timms():
    assert resolve("mobilenetv2") == "mobilenetv2_100"
    assert resolve("mobilenetv3") == "mobilenetv3_large_100"
    assert resolve("mobilenetv4") == "mobilenetv4_conv_small"
    assert resolve(" resnet18 ") == "resnet18"


def test_tag_is_kept_also_behind_an_alias():
    assert resolve("resnet50.a1_in1k") == "resnet50.a1_in1k"
    assert resolve("mobilenetv2.ra_in1k") == "mobilenetv2_100.ra_in1k"


def test_wrong_tag_lists_the_known_ones():
    with pytest.raises(UnknownModel) as raised:
        resolve("resnet18.nonesuch")
    assert "nonesuch" in str(raised.value)
    assert "a1_in1k, " in str(raised.value) and "fb_ssl_yfcc100m_ft_in1k" in str(raised.value)


def test_renamed_timm_model_resolves():
    assert resolve("tf_efficientnet_b0_ns") == "tf_efficientnet_b0.ns_jft_in1k"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("resnet5O", "resnet50"),
        ("ResNet-50", "resnet50"),
        ("MobileNet-V2", "mobilenetv2"),
        ("mobilnetv3", "mobilenetv3"),
        ("efficientnet_lit", "efficientnet_lite"),
        ("cifar_resnet_56", "cifar_resnet56"),
        ("vit_smal", "vit_small"),
    ],
)
def test_misspelled_name_is_refused_with_the_one_that_was_meant(typed, meant):
    assert meant in find_nearest(typed)
    with pytest.raises(UnknownModel) as raised:
        resolve(typed)
    assert typed in str(raised.value) and meant in str(raised.value)
    assert raised.value.exit_code == 2 and isinstance(raised.value, ModelError)


@pytest.mark.parametrize("typed", ["", ".", "???", "zzzzqqqq"])
def test_unknown_name_points_to_the_list(typed):
    with pytest.raises(UnknownModel, match="compress models"):
        resolve(typed)


def test_pattern_lists_names_and_aliases_in_natural_order():
    names = find_matching("mobilenetv2*")
    assert "mobilenetv2" in names and "mobilenetv2_100" in names
    resnets = find_matching("cifar_resnet*")
    assert resnets.index("cifar_resnet8") < resnets.index("cifar_resnet14") < resnets.index("cifar_resnet110")
    assert find_matching("WRN_16") == ["cifar_wrn_16_1", "cifar_wrn_16_2"]
    assert find_matching("nothing_like_it*") == []


def test_names_import_neither_torch_nor_timm():
    code = (
        "import sys, questpress.models, questpress.models.build;"
        "sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
