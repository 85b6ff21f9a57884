import re

import pytest
import timm
import torch
from questpress.models.build import build
from questpress.models.checkpoint import Checkpoint, read_checkpoint
from questpress.models.errors import ModelError
from questpress.models.initialize import initialize
from questpress.models.keys import list_parts
from questpress.models.weights import class_count, load_into, match


def checkpoint(state_dict: dict[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint(state_dict, None, "a file", "0" * 64)


def resnet(seed: int) -> torch.nn.Module:
    return build("cifar_resnet8", num_classes=3, image_size=32, seed=seed)


def same(network: torch.nn.Module, state_dict: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state_dict[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "student.network."]
)
def test_wrapper_prefixes_are_removed(prefix):
    source = build("cifar_resnet8", num_classes=3, image_size=32, seed=1).state_dict()
    wrapped = {prefix + key: value for key, value in source.items()}
    network = build("cifar_resnet8", num_classes=3, image_size=32, seed=2)
    load_into(network, checkpoint(wrapped))
    assert same(network, source)


@pytest.mark.parametrize(
    "wrapper", ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module._orig_mod"]
)
def test_wrappers_inside_names_are_removed(wrapper):
    source = resnet(1).state_dict()
    wrapped = {key.replace("layer1.0.", f"layer1.0.{wrapper}."): value for key, value in source.items()}
    network = resnet(2)
    load_into(network, checkpoint(wrapped))
    assert same(network, source)


def test_averaged_copy_is_taken_and_reported():
    averaged, network = resnet(1).state_dict(), resnet(2)
    both = {f"model.{key}": value for key, value in resnet(3).state_dict().items()}
    both |= {f"model_ema.module.{key}": value for key, value in averaged.items()}
    load_into(network, checkpoint(both))
    assert same(network, averaged)
    matched = match(network, checkpoint(both))
    assert matched.source == "averaged copy model_ema"
    assert list_parts(matched.left_out) == f"model ({len(averaged)} tensors)"


def test_averages_of_parameters_alone_are_left_out():
    source, network = resnet(1).state_dict(), resnet(2)
    parameters = {f"model_ema.{key}": value + 1 for key, value in resnet(1).named_parameters()}
    load_into(network, checkpoint(source | parameters))
    assert same(network, source)
    assert match(network, checkpoint(source | parameters)).left_out == parameters.keys()


HEADS = [
    ("", "classifier", "classifier"),
    ("", "fc.1", "fc.1"),
    ("", "heads.head", "heads.head"),
    ("backbone.", "head", "head"),
    ("model.backbone.", "model.head.fc", "model.head.fc"),
]


@pytest.mark.parametrize(("prefix", "head", "reported"), HEADS)
def test_head_under_another_name_is_taken_and_reported(prefix, head, reported):
    source, network = resnet(1).state_dict(), resnet(2)
    file = checkpoint({head + k[2:] if k.startswith("fc.") else prefix + k: v for k, v in source.items()})
    assert class_count(file, network) == 3
    load_into(network, file)
    assert same(network, source)
    assert match(network, file).head == reported and not match(network, file).left_out


def test_head_with_further_layers_is_left_out_and_reported():
    source, network = resnet(1).state_dict(), resnet(2)
    source = {k.replace("fc.", "head.1."): v for k, v in source.items()} | {"head.0.weight": torch.ones(64)}
    assert class_count(checkpoint(source), network) is None
    with pytest.raises(ModelError, match="no head that fits"):
        load_into(network, checkpoint(source))
    load_into(network, checkpoint(source), allow_head_mismatch=True)
    assert match(network, checkpoint(source)).left_out == {"head.0.weight", "head.1.weight", "head.1.bias"}


def test_one_of_two_possible_heads_is_not_guessed():
    source = resnet(1).state_dict()
    heads = {f"{name}.weight": torch.ones(3, 64) for name in ("head", "classifier")}
    features = {key: value for key, value in source.items() if not key.startswith("fc.")}
    assert class_count(checkpoint(features | heads), resnet(2)) is None


def test_head_without_bias_and_as_a_convolution_fits():
    source, network = resnet(1).state_dict(), resnet(2)
    weight = source.pop("fc.weight")
    del source["fc.bias"]
    load_into(network, checkpoint(source | {"head.weight": weight[:, :, None, None]}))
    assert torch.equal(network.fc.weight, weight) and not network.fc.bias.any()


def test_counters_losses_and_metrics_are_left_out():
    source, network = resnet(1).state_dict(), resnet(2)
    extra = {
        "total_ops": torch.zeros(1),
        "layer1.0.total_params": torch.zeros(1),
        "n_averaged": torch.tensor(5),
        "criterion.weight": torch.ones(3),
        "train_acc.tp": torch.ones(3),
    }
    load_into(network, checkpoint(source | extra))
    assert same(network, source)
    assert match(network, checkpoint(source | extra)).left_out == extra.keys()


def test_description_of_a_file_contains_what_was_taken_and_left_out(tmp_path):
    source = build("cifar_resnet8", num_classes=7, image_size=32, seed=1).state_dict()
    file, notes = tmp_path / "w.pth", []
    torch.save({f"net.{k}": v for k, v in source.items()} | {"loss.weight": torch.ones(7)}, file)
    loaded = initialize("cifar_resnet8", str(file), "auto", ["a", "b"], 32, 0, notes.append)
    text = "prefix net; without its head for 7 classes; left out: loss (1 tensor)"
    assert loaded.weights.endswith(f"; {text})") and notes == [f"weights of w.pth: {text}"]
    loaded = initialize("cifar_resnet8", str(file), "none", ["a", "b"], 32, 0, notes.append)
    assert loaded.weights.endswith("; prefix net; left out: fc (2 tensors), loss (1 tensor))")


def test_matching_network_of_a_file_is_loaded():
    student = build("cifar_resnet8", num_classes=3, image_size=32, seed=1).state_dict()
    teacher = build("cifar_wrn_16_1", num_classes=3, image_size=32, seed=1).state_dict()
    both = {f"student.{k}": v for k, v in student.items()} | {f"teacher.{k}": v for k, v in teacher.items()}
    network = build("cifar_wrn_16_1", num_classes=3, image_size=32, seed=2)
    load_into(network, checkpoint(both))
    assert same(network, teacher)


def test_file_from_before_batch_counters_is_complete():
    source = build("cifar_resnet8", num_classes=3, image_size=32, seed=1).state_dict()
    old = {key: value for key, value in source.items() if not key.endswith("num_batches_tracked")}
    network = build("cifar_resnet8", num_classes=3, image_size=32, seed=2)
    load_into(network, checkpoint(old))
    assert same(network, source)


@pytest.mark.parametrize("name", ["cifar_resnet8", "mobilenetv2_035", "convnext_atto", "test_vit"])
def test_head_for_other_classes_is_replaced_only_when_that_is_allowed(name):
    source = build(name, num_classes=11, image_size=32, seed=1)
    network = build(name, num_classes=3, image_size=32, seed=2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    file = checkpoint(source.state_dict())
    assert class_count(file, network) == 11
    with pytest.raises(ModelError, match=r"11 classes.*needs 3 classes"):
        load_into(network, file)
    assert same(network, before)
    load_into(network, file, allow_head_mismatch=True)
    for key, value in network.state_dict().items():
        loaded = file.state_dict[key]
        assert torch.equal(value, loaded if loaded.shape == value.shape else before[key])


def test_backbone_without_a_head_fits_when_a_new_head_is_allowed():
    source = build("test_vit", num_classes=0, image_size=32, seed=1).state_dict()
    network = build("test_vit", num_classes=3, image_size=32, seed=2)
    assert class_count(checkpoint(source), network) is None
    with pytest.raises(ModelError, match="no head"):
        load_into(network, checkpoint(source))
    load_into(network, checkpoint(source), allow_head_mismatch=True)
    assert torch.equal(network.blocks[0].attn.qkv.weight, source["blocks.0.attn.qkv.weight"])


def test_weights_of_another_architecture_are_refused_with_the_keys_and_change_nothing():
    source = build("cifar_wrn_16_1", num_classes=3, image_size=32, seed=1).state_dict()
    network = build("cifar_resnet8", num_classes=3, image_size=32, seed=2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ModelError) as raised:
        load_into(network, checkpoint(source), allow_head_mismatch=True)
    assert "cifar_resnet8" in str(raised.value) and "layer1.0.conv1.weight" in str(raised.value)
    assert "block1.layer.0.bn1.weight" in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).count("weight") < 25
    assert same(network, before)


def test_chance_match_of_a_heads_name_does_not_hide_what_is_unexpected():
    source = build("test_convnext", num_classes=3, image_size=32, seed=1).state_dict()
    with pytest.raises(ModelError, match=r"unexpected \(stem.0.weight"):
        load_into(build("resnet18", num_classes=3, image_size=32), checkpoint(source))


def test_key_of_another_shape_is_named_with_both_shapes():
    source = build("cifar_resnet8", num_classes=3, image_size=32, seed=1).state_dict()
    source["conv1.weight"] = torch.zeros(16, 3, 7, 7)
    with pytest.raises(ModelError, match=r"conv1.weight \[16, 3, 7, 7\] for \[16, 3, 3, 3\]"):
        load_into(build("cifar_resnet8", num_classes=3, image_size=32), checkpoint(source))


@pytest.mark.parametrize(("name", "sizes"), [("test_vit", (64, 96)), ("swinv2_tiny_window8_256", (64, 128))])
def test_transformer_takes_weights_made_for_another_image_size(name, sizes):
    source = build(name, num_classes=3, image_size=sizes[0], seed=1)
    network = build(name, num_classes=3, image_size=sizes[1], seed=2)
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    load_into(network, checkpoint({f"module.{key}": value for key, value in source.state_dict().items()}))
    assert torch.equal(torch.rand(1), expected)
    resampled = {
        key for key, value in network.state_dict().items() if value.shape != source.state_dict()[key].shape
    }
    for key, value in network.state_dict().items():
        assert key in resampled or torch.equal(value, source.state_dict()[key])
    assert "head.weight" not in resampled


def test_image_size_and_head_can_both_differ():
    source = build("test_vit", num_classes=7, image_size=64, seed=1).state_dict()
    network = build("test_vit", num_classes=3, image_size=96, seed=2)
    load_into(network, checkpoint(source), allow_head_mismatch=True)
    assert torch.equal(network.blocks[1].mlp.fc1.weight, source["blocks.1.mlp.fc1.weight"])


def original_convnext(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names of the ConvNeXt authors' own code."""
    pairs = [
        (r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."), (r"conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"),
        (r"^head\.norm", "norm"), (r"^head\.fc", "head"),
    ]  # fmt: skip
    renamed = {}
    for key, value in state_dict.items():
        for ours, theirs in pairs:
            key = re.sub(ours, theirs, key)
        renamed[key] = value
    return renamed


def test_weights_in_the_format_of_the_original_authors_go_through_timms_conversion():
    source = build("test_convnext", num_classes=10, image_size=32, seed=1).state_dict()
    assert set(original_convnext(source)) != set(source)
    same_classes = build("test_convnext", num_classes=10, image_size=32, seed=2)
    load_into(same_classes, checkpoint(original_convnext(source)))
    assert same(same_classes, source)
    fewer = build("test_convnext", num_classes=4, image_size=32, seed=2)
    assert class_count(checkpoint(original_convnext(source)), fewer) == 10
    load_into(fewer, checkpoint(original_convnext(source)), allow_head_mismatch=True)
    assert torch.equal(fewer.stages[1].downsample[1].weight, source["stages.1.downsample.1.weight"])


def test_timms_own_training_checkpoints_fit(tmp_path):
    source = timm.create_model("mobilenetv3_small_050", num_classes=3)
    torch.save(
        {"epoch": 1, "arch": "mobilenetv3_small_050", "state_dict": source.state_dict()},
        tmp_path / "last.pth.tar",
    )
    network = build("mobilenetv3_small_050", num_classes=3, image_size=64)
    load_into(network, read_checkpoint(tmp_path / "last.pth.tar"))
    assert same(network, source.state_dict())


def test_weights_that_were_cut_to_whole_numbers_are_refused():
    network = build("cifar_resnet8", num_classes=3, image_size=16)
    cut = {key: value.int() for key, value in network.state_dict().items()}
    with pytest.raises(ModelError, match=r"'conv1.weight' has dtype torch.int32"):
        load_into(network, Checkpoint(cut, None, "cut.pth", "0"))


def test_minus_infinity_in_a_mask_is_no_broken_weight():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    load_into(Masked(), Checkpoint(Masked().state_dict(), None, "masked.pth", "0"))
    for bad in (torch.inf, torch.nan):
        broken = {**Masked().state_dict(), "mask": torch.tensor([0.0, bad])}
        with pytest.raises(ModelError, match="'mask' contains values that are not finite"):
            load_into(Masked(), Checkpoint(broken, None, "masked.pth", "0"))


def test_gray_weights_compute_the_same_of_an_images_gray():
    gray, network = timm.create_model("resnet18", num_classes=3, in_chans=1), build("resnet18", num_classes=3)
    load_into(network, checkpoint({f"module.{k}": v for k, v in gray.state_dict().items()}))
    matched = match(network, checkpoint(gray.state_dict()))
    assert matched.source == "gray weights expanded to RGB" and not matched.left_out
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    luma = 0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]
    assert torch.allclose(network.eval()(image), gray.eval()(luma), atol=1e-4)


def test_weights_are_fitted_to_a_rectangle():
    square = build("vit_tiny_patch16_224", num_classes=3, image_size=64, seed=0)
    wide = build("vit_tiny_patch16_224", num_classes=3, image_size=(32, 96), seed=1)
    load_into(wide, checkpoint(square.state_dict()))
    assert wide.pos_embed.shape == (1, 1 + 2 * 6, 192) and torch.equal(wide.cls_token, square.cls_token)
