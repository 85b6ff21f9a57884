"""Views and the vocabulary on the emulated device: the CPU's values, and views without waiting."""

from pathlib import Path

import numpy as np
import pytest
import torch
from questpress.pipeline.data.render import Views
from questpress.pipeline.data.views import ViewPolicy
from questpress.pipeline.methods.quest import vocabulary
from questpress.pipeline.methods.quest.vocabulary import FeatureMatrix, measure_words, nearest_words

from tests.data.test_render import photos, small
from tests.support.emulated_cuda import Device

POLICIES = {
    "resized": ViewPolicy("resized_crop", color_jitter=0.4),
    "resized, changed": ViewPolicy("resized_crop", randaugment=(8, 9), erasing=0.5, mixup=1.0),
    "padded": ViewPolicy(
        "pad_crop", side=12, crop=12, pad=3, color_jitter=0.4, randaugment=(8, 9), erasing=0.5, mixup=1.0,
        cutmix=1.0,
    ),
    "reflected": ViewPolicy("pad_crop", side=12, crop=8, pad=3, mode="reflect"),
    "centered": ViewPolicy("center"),
}  # fmt: skip


@pytest.mark.parametrize("resident", ["device", "host"])
@pytest.mark.parametrize("name", POLICIES)
def test_views_equal_the_cpus_and_never_wait(gpu: Device, name: str, resident: str) -> None:
    policy = POLICIES[name]
    decoded = small() if policy.kind == "pad_crop" else photos()
    size = policy.crop or 8
    here = Views(decoded.labels, decoded.keys, policy, 0, size, decoded.pixels)
    pixels = decoded.pixels.to("cuda") if resident == "device" else decoded.pixels
    there = Views(decoded.labels, decoded.keys, policy, 0, size, pixels)
    plan = [(torch.arange(6).repeat(4), torch.arange(24) + 24 * n) for n in range(2)]
    with gpu.forbid_waits():
        batches = list(there.batches(plan, "cuda", also=5))
    for ours, theirs in zip(batches, here.batches(plan), strict=True):
        assert ours[1].cpu().equal(theirs[1]) and ours[2].shape[2:] == (5, 5)
        difference = (ours[0].cpu().int() - theirs[0].int()).abs().float()
        # Resized pixels differ by up to one level, which changes may scale.
        assert difference.mean() <= (0 if policy.kind == "pad_crop" else 0.5)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_vocabulary_is_learned_on_the_device(
    gpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", 4 * 50)  # four chunks
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(6, 4)).astype(np.float32) * 20
    features = (centers[rng.integers(0, 6, 200)] + rng.normal(size=(200, 4)) / 10).astype(np.float32)
    matrix = FeatureMatrix(200, 4, tmp_path / "features" if is_streamed else None)
    maps = torch.from_numpy(features).view(4, 50, 1, 4).permute(0, 3, 1, 2)
    assert matrix.fill(maps.to("cuda").split(3), (50, 1), 200) and matrix.device.type == "cuda"
    words = matrix.kmeans(6, 20, 0)
    learned = measure_words(matrix, words)
    distance, word = nearest_words(features, words)
    assert learned["usage"].tolist() == np.bincount(word, minlength=6).tolist()
    assert learned["mu"] == pytest.approx(float(distance.mean()), rel=1e-2)
    gpu.waits.clear()
    nearest, _, sums = matrix.assign_to(words)
    assert gpu.waits.count("a copy to the host") == 3  # not those of each chunk
    assert nearest.tolist() == word.tolist()
    expected = [features[word == number].sum(0) for number in range(6)]
    np.testing.assert_allclose(sums, expected, rtol=1e-2 if is_streamed else 1e-5)
