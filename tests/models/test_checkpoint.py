import argparse
import hashlib
import json
from collections import OrderedDict, defaultdict, deque
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from questpress.models.build import build
from questpress.models.checkpoint import read_checkpoint, save_weights, tensors_digest
from questpress.models.errors import ModelError
from safetensors.torch import save_file


def weights() -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.arange(12.0).reshape(3, 4), "conv.bias": torch.ones(3)}


def plus_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value + 1 for key, value in weights.items()}


def test_what_is_saved_is_read_back_bit_by_bit_with_its_metadata(tmp_path):
    network = build("cifar_resnet8", num_classes=4, image_size=32, seed=0).to(
        memory_format=torch.channels_last
    )
    file = tmp_path / "student.safetensors"
    save_weights(network, file, {"origin": "a test", "labels": json.dumps(["a", "b", "c", "d"])})
    read = read_checkpoint(file)
    assert list(read.state_dict) and set(read.state_dict) == set(network.state_dict())
    assert all(torch.equal(read.state_dict[key], value) for key, value in network.state_dict().items())
    assert read.metadata["origin"] == "a test" and read.label_names == ("a", "b", "c", "d")


def test_tied_weights_are_saved_under_both_names(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    network[1].weight = network[0].weight
    save_weights(network, tmp_path / "tied.safetensors", {})
    read = read_checkpoint(tmp_path / "tied.safetensors").state_dict
    assert torch.equal(read["0.weight"], read["1.weight"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3, "best_prec1": 93.4},
        lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}},
        lambda w: {"epoch": 1, "net": w, "acc": 0.9},
        lambda w: {"checkpoint": {"model_state_dict": w}},
        lambda w: {"state_dict": w, "args": argparse.Namespace(lr=0.1)},
        lambda w: {"anything": w, "optimizer_states": {f"k{i}": torch.ones(1) for i in range(9)}},
        lambda w: {"state_dict": plus_one(w), "state_dict_ema": w},
        lambda w: {"params": plus_one(w), "params_ema": w},
        lambda w: {"model": plus_one(w), "ema": {"module": w, "updates": 3}},
        lambda w: {**plus_one(w), "swa_model": {**w}},
        lambda w: {"model": plus_one(w), "callbacks": {"EMA": {"weights": w}}},
    ],
)
def test_weights_are_found_wherever_a_training_program_put_them(tmp_path, wrap):
    torch.save(wrap(weights()), tmp_path / "checkpoint.pth")
    read = read_checkpoint(tmp_path / "checkpoint.pth")
    assert set(read.state_dict) == set(weights())
    assert all(torch.equal(read.state_dict[key], value) for key, value in weights().items())


def test_partial_averages_are_not_the_network(tmp_path):
    whole = weights() | {f"layer{index}.weight": torch.ones(2) for index in range(4)}
    torch.save({"model": whole, "ema": {"conv.bias": torch.zeros(3)}}, tmp_path / "both.pth")
    assert set(read_checkpoint(tmp_path / "both.pth").state_dict) == set(whole)


def test_collections_that_were_not_taken_are_reported(tmp_path):
    torch.save({"params": plus_one(weights()), "params_ema": weights()}, tmp_path / "both.pth")
    assert read_checkpoint(tmp_path / "both.pth").notes == ("params_ema, not params",)
    torch.save({"state_dict": weights(), "epoch": 3}, tmp_path / "one.pth")
    assert read_checkpoint(tmp_path / "one.pth").notes == ()


@pytest.mark.parametrize(
    "value",
    [
        np.float64(86.25),
        np.str_("a"),
        np.datetime64("2026-01-01"),
        np.float32,
        np.ones((2, 3)),
        np.array([], dtype="U3"),
        np.random.get_state(),
        Path("/data/photos"),
        PureWindowsPath("c:\\photos"),
        datetime.now(UTC),
        defaultdict(list, {"loss": [1.0]}),
        OrderedDict(a=Path("b")),
        deque([1, 2]),
        {1, Path("a")},
        frozenset([1]),
        Decimal("1.5"),
        SimpleNamespace(lr=0.1),
        torch.__version__,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_plain_values_next_to_weights_are_accepted(tmp_path, value, is_zip):
    content = {"state_dict": weights(), "value": value}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=is_zip)
    assert set(read_checkpoint(tmp_path / "w.pth").state_dict) == set(weights())


def test_old_style_torch_file_is_read_too(tmp_path):
    torch.save(weights(), tmp_path / "old.th", _use_new_zipfile_serialization=False)
    assert set(read_checkpoint(tmp_path / "old.th").state_dict) == set(weights())


def test_hash_is_that_of_the_file(tmp_path):
    save_file(weights(), tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    assert read_checkpoint(tmp_path / "w.safetensors").sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "known",
    [
        {"classes": ["cat", "dog"]},
        {"class_names": ("cat", "dog")},
        {"class_to_idx": {"dog": 1, "cat": 0}},
        {"idx_to_class": {1: "dog", 0: "cat"}},
        {"meta": {"CLASSES": ("cat", "dog")}},
        {"config": {"id2label": {"0": "cat", "1": "dog"}}},
        {"classes": np.array(["cat", "dog"])},
        {"classes": np.array(["cat", "dog"], dtype=object)},
        {"classes": [np.str_("cat"), np.str_("dog")]},
        {"class_to_idx": defaultdict(int, {"dog": np.int64(1), "cat": np.int64(0)})},
    ],
)
def test_class_names_are_found_in_the_order_of_the_logits(tmp_path, known):
    torch.save({"state_dict": weights(), **known}, tmp_path / "named.pth")
    assert read_checkpoint(tmp_path / "named.pth").label_names == ("cat", "dog")


@pytest.mark.parametrize(
    "unclear", [{"classes": 10}, {"class_to_idx": {"a": 0, "b": 2}}, {"labels": torch.ones(2)}]
)
def test_class_names_that_are_not_clear_are_not_made_up(tmp_path, unclear):
    torch.save({"state_dict": weights(), **unclear}, tmp_path / "unnamed.pth")
    assert read_checkpoint(tmp_path / "unnamed.pth").label_names is None


def test_pickled_network_is_refused_with_a_hint(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(ModelError, match=r"could run code.*state_dict alone"):
        read_checkpoint(tmp_path / "whole.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"these are not weights, just words", "neither"),
        ("empty.pth", b"", "neither"),
        ("cut.safetensors", b'\xff\x00\x00\x00\x00\x00\x00\x00{"a":', "damaged"),
        ("noise.safetensors", bytes(range(256)), "damaged"),
        ("noise.pth", b"\x80\x02" + bytes(range(200)), "damaged"),
        ("cut.pth", b"PK\x03\x04" + bytes(100), "damaged"),
    ],
)
def test_damaged_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as raised:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(raised.value) and name in str(raised.value)


def test_truncated_missing_and_folder_paths_are_distinguished(tmp_path):
    torch.save(weights(), tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:700])
    with pytest.raises(ModelError, match="damaged"):
        read_checkpoint(tmp_path / "half.pth")
    with pytest.raises(ModelError, match="does not exist"):
        read_checkpoint(tmp_path / "missing.pth")
    with pytest.raises(ModelError, match="folder"):
        read_checkpoint(tmp_path)


def test_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3, "args": {"lr": 0.1}}, tmp_path / "empty.pth")
    with pytest.raises(ModelError, match="no weights"):
        read_checkpoint(tmp_path / "empty.pth")


def test_digest_depends_on_weights_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(4).bfloat16()}
    digests = []
    for number, metadata in enumerate(({"key": "one"}, {"key": "another", "labels": "[]"})):
        save_file(tensors, tmp_path / f"{number}.safetensors", metadata)
        digests.append(tensors_digest(tmp_path / f"{number}.safetensors"))
    assert digests[0] == digests[1]
    for other in ({**tensors, "a": tensors["a"].T.contiguous()}, {**tensors, "b": torch.tensor(4)}):
        save_file(other, tmp_path / "other.safetensors")
        assert tensors_digest(tmp_path / "other.safetensors") != digests[0]
