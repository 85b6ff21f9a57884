import os
import time

import huggingface_hub
import pytest
import timm
import torch
from questpress.models.catalog import fetch_pretrained, find_license, has_pretrained, is_free
from questpress.models.errors import ModelError
from safetensors.torch import save_file

from tests.support.little import Calls


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no internet behind it."""

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    return tmp_path


def test_has_weights_builds_no_network():
    assert has_pretrained("resnet50") and has_pretrained("mobilenetv2") and has_pretrained("resnet50.a1_in1k")
    assert not has_pretrained("cifar_resnet56")


def test_license_is_free_only_if_it_is_known_to_be():
    assert find_license("resnet50") == "apache-2.0" and is_free(find_license("resnet50"))
    assert not is_free(find_license("convnextv2_tiny")) and "nc" in (find_license("convnextv2_tiny") or "")
    assert find_license("cifar_resnet56") is None and not is_free(None) and not is_free("dinov3-license")


def test_offline_error_lists_three_remedies(cache):
    started = time.monotonic()
    with pytest.raises(ModelError) as raised:
        fetch_pretrained("resnet50", option="--student-weights")
    assert time.monotonic() - started < 10
    for way in (
        "--student-weights FILE",
        "--student-weights none",
        "HF_HOME",
        str(cache),
        "cannot be reached",
    ):
        assert way in str(raised.value)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 1


@pytest.mark.usefixtures("cache")
def test_failed_download_is_reported_as_unreachable(monkeypatch):
    def fail(*_args, **_kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("the connection was lost")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ModelError, match=r"huggingface.co cannot be reached"):
        fetch_pretrained("test_resnet")


def test_model_without_published_weights_is_reported():
    with pytest.raises(ModelError, match="no published weights") as raised:
        fetch_pretrained("cifar_resnet56")
    assert "reached" not in str(raised.value) and "--teacher-weights none" in str(raised.value)


def test_cached_weights_need_no_network(cache):
    cfg = timm.models.get_pretrained_cfg("test_resnet")
    source = timm.create_model("test_resnet", num_classes=cfg.num_classes)
    save_file(source.state_dict(), snapshot_in(cache) / "model.safetensors")
    fetched = fetch_pretrained("test_resnet")
    assert all(torch.equal(fetched.state_dict[key], value) for key, value in source.state_dict().items())
    assert fetched.license == "apache-2.0" and fetched.source == f"{cfg.hf_hub_id} on Hugging Face"
    assert fetched.label_names is not None and fetched.label_names[0] == "n01440764"
    assert fetched.label_descriptions is not None and "tench" in fetched.label_descriptions[0]


def snapshot_in(cache):
    cfg = timm.models.get_pretrained_cfg("test_resnet")
    repository = cache / f"models--{cfg.hf_hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_damaged_file_in_the_cache_is_named(cache):
    (snapshot_in(cache) / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match=r"Delete .*model.safetensors"):
        fetch_pretrained("test_resnet")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_published_weights_that_would_run_code_do_not(cache, name):
    torch.save(
        {"state_dict": {}, "extra": Calls(os.mkdir, str(cache / "was_run"))}, snapshot_in(cache) / name
    )
    with pytest.raises(ModelError, match=f"cannot be loaded.*Delete .*{name}"):
        fetch_pretrained("test_resnet")
    assert not (cache / "was_run").exists()
