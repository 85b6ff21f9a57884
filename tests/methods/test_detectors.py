"""PKD and mimicking of detectors, compared with numpy and with unfolded patches."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from questpress.models.detection.regions import build_box_head
from questpress.models.errors import ModelError
from questpress.pipeline import methods
from questpress.pipeline.errors import UsageError
from questpress.pipeline.methods import base, pkd
from questpress.pipeline.methods.base import Batch, Setup, Shapes
from questpress.pipeline.methods.mimic import dense
from questpress.pipeline.methods.shapes import check_methods
from torch import Tensor
from torchvision.ops import roi_align

CHANNELS, ANCHORS = 6, 3
GRIDS = ((4, 6), (2, 3))


def shapes(channels: int = CHANNELS, towers: bool = True, region_vector: int | None = None) -> Shapes:
    maps = {"map": (channels, *GRIDS[0])}
    for level, grid in enumerate(GRIDS):
        maps[f"map@{level}"] = (channels, *grid)
        if towers:
            maps[f"tower@{level}"] = (channels, *grid)
    levels = len(GRIDS) if region_vector else 0
    return Shapes(maps, None, 2, levels=len(GRIDS), region_vector=region_vector, region_levels=levels)


def two_stage(vector: int = 5) -> Shapes:
    return shapes(towers=False, region_vector=vector)


def features(seed: int, images: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        f"{kind}@{level}": torch.randn(images, CHANNELS, *grid, generator=generator)
        for kind in ("map", "tower")
        for level, grid in enumerate(GRIDS)
    }
    locations = sum(height * width for height, width in GRIDS)
    corners = torch.rand(locations * ANCHORS, 2, 2, generator=generator).sort(dim=1).values
    anchors = corners.flatten(1)
    anchors[:ANCHORS] = torch.tensor([0.1, 0.1, 0.6, 0.37])  # IoU .45 with the first box of ``targets``
    return {**drawn, "anchors": anchors}


def targets() -> Tensor:
    """Boxes of three images: two boxes; none; one, and a crowd."""
    labels = torch.full((3, 2, 7), -1.0)
    labels[0, 0] = torch.tensor([0, 0.1, 0.1, 0.6, 0.7, 100, 0])
    labels[0, 1] = torch.tensor([1, 0.5, 0.2, 0.9, 0.9, 100, 0])
    labels[2, 0] = torch.tensor([1, 0.0, 0.0, 0.5, 0.5, 100, 0])
    labels[2, 1] = torch.tensor([0, 0.4, 0.4, 1.0, 1.0, 100, 1])
    return labels


def build(
    name: str,
    settings: dict[str, object] | None = None,
    teacher: Shapes | None = None,
    student: Shapes | None = None,
    prepared: dict[str, Tensor] | None = None,
) -> base.Method:
    chosen = {f"{name}.{key}": value for key, value in (settings or {}).items()}
    parameters = methods.parse_parameters([name], chosen)[name]
    setup = Setup(student or shapes(), [teacher or shapes()])
    cls = methods.load(name)
    cls.check(parameters, setup, 10)
    weight = torch.randn(8, 9 * CHANNELS, generator=torch.Generator().manual_seed(5))
    hashes = {"0.weight": weight, "0.bias": torch.zeros(8)}
    return cls(parameters, Setup(setup.student, setup.teachers, prepared or hashes))


def test_pkd_is_one_minus_the_correlation_of_each_channel() -> None:
    ours, theirs = features(0), features(1)
    loss = build("pkd")(Batch(ours, [theirs], targets()))["pkd"]
    expected = 0.0
    for level in range(len(GRIDS)):
        a, b = (
            f[f"map@{level}"].transpose(0, 1).flatten(1).numpy().astype(np.float64) for f in (ours, theirs)
        )
        n = a.shape[1]
        r = np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])
        expected += float((1 - r).mean()) * (n - 1) / n  # torch's std has n − 1 degrees of freedom
    assert float(loss) == pytest.approx(10 * expected, rel=1e-4)


def test_pkd_of_one_number_of_each_channel_is_zero() -> None:
    one = [torch.randn(1, CHANNELS, 1, 1, requires_grad=True) for _ in range(2)]
    loss = pkd.correlation_loss(*one)
    assert loss.item() == 0 and not torch.autograd.grad(loss, one[0])[0].any()


def test_pkd_ignores_scale_and_offset_and_follows_only_the_student() -> None:
    ours = {name: f.requires_grad_() for name, f in features(0).items()}
    same = {name: 3 * f.detach() + 2 for name, f in ours.items()}
    loss = build("pkd")(Batch(ours, [same], targets()))["pkd"]
    assert loss.item() == pytest.approx(0, abs=1e-4)
    theirs = {name: f.requires_grad_() for name, f in features(1).items()}
    pkd.correlation_loss(ours["map@0"], theirs["map@0"].detach()).backward()
    assert ours["map@0"].grad is not None and theirs["map@0"].grad is None


def mimic_losses(variant: str, f_s: np.ndarray, f_t: np.ndarray, weight: np.ndarray) -> np.ndarray:
    a, h = f_s @ weight.T, f_t @ weight.T > 0
    square, hashed = ((f_s - f_t) ** 2).mean(-1), (np.logaddexp(0, a) - a * h).mean(-1)
    return {"l2": square, "lsh": hashed, "lshl2": square + hashed}[variant]


def patches(f: Tensor) -> Tensor:
    """Unfold a map [B,C,h,w] to the 3×3 patch of each location, [B,h·w,9·C]."""
    return F.unfold(f, 3, padding=1).transpose(1, 2)


@pytest.mark.parametrize("variant", ["l2", "lsh", "lshl2"])
def test_mimicking_equals_the_formula_on_unfolded_patches(variant: str) -> None:
    ours, theirs, labels = features(0), features(1), targets()
    method = build("mimic", {"variant": variant})
    loss = method(Batch(ours, [theirs], labels))["mimic"]
    weight = torch.randn(8, 9 * CHANNELS, generator=torch.Generator().manual_seed(5)).double().numpy()
    f_s, f_t = (
        torch.cat([patches(f[f"tower@{level}"]) for level in range(len(GRIDS))], dim=1).double().numpy()
        for f in (ours, theirs)
    )
    losses = mimic_losses(variant, f_s, f_t, weight)
    trained = dense.find_trained(ours["anchors"], labels, losses.shape[1]).numpy()
    assert 0 < trained[0].mean() < 1 and trained[1].all()
    means = [losses[image][trained[image]].mean() for image in (0, 2)]  # the image without boxes is left out
    assert float(loss) == pytest.approx(7 * np.mean(means), rel=1e-4)


@pytest.mark.parametrize("variant", ["l2", "lsh", "lshl2"])
def test_mimicking_regions_equals_the_formula_at_the_students_regions(variant: str) -> None:
    generator = torch.Generator().manual_seed(7)
    head = build_box_head(CHANNELS, 5)
    weight = torch.randn(20, 5, generator=generator)
    prepared = {f"0.head.{key}": value for key, value in head.state_dict().items()}
    prepared |= {"0.weight": weight, "0.bias": torch.zeros(20)}
    method = build("mimic", {"variant": variant}, two_stage(), two_stage(), prepared)
    regions = torch.tensor([[[0, 0, 9, 12], [5, 3, 30, 20.0]], [[2, 2, 8, 8], [0, 0, 0, 0]]])
    vectors = torch.randn(2, 2, 5, generator=generator).requires_grad_()
    maps = features(1, images=2)
    assert method.reads_of_teachers == [{"map@0", "map@1"}]
    teacher = {name: maps[name] for name in method.reads_of_teachers[0]}
    loss = method(Batch({"regions": regions, "region_vectors": vectors}, [teacher], targets()[:2]))["mimic"]
    rows = torch.tensor([[0, 0, 0, 9, 12], [0, 5, 3, 30, 20], [1, 2, 2, 8, 8.0]])
    # All regions are small, so they are pooled from the finest level, of stride 8.
    f_t = head(roi_align(maps["map@0"], rows, 7, 1 / 8, 2)).detach().double().numpy()
    f_s = vectors.detach()[[0, 0, 1], [0, 1, 0]].double().numpy()
    expected = mimic_losses(variant, f_s, f_t, weight.double().numpy())
    assert float(loss.detach()) == pytest.approx(7 * expected.mean(), rel=1e-4)
    loss.backward()
    assert vectors.grad is not None and vectors.grad[0].all() and not vectors.grad[1, 1].any()
    assert all(p.grad is None and not p.requires_grad for p in method.parameters())


def test_locations_between_the_thresholds_are_left_out() -> None:
    box = torch.tensor([[[0, 0.0, 0.0, 1.0, 1.0, 1, 0]]])
    heights = torch.tensor([0.9, 0.45, 0.2, 0.45])  # their IoU with the box
    anchors = torch.stack([torch.zeros(4), torch.zeros(4), torch.ones(4), heights], dim=1)
    assert dense.find_trained(anchors, box, 4).tolist() == [[True, False, True, False]]
    assert dense.find_trained(anchors, box, 2).tolist() == [[True, True]]
    assert dense.find_trained(anchors[1:], box, 3).tolist() == [[True, True, True]]  # the best one counts
    crowd = box.clone()
    crowd[..., 6] = 1
    assert dense.find_trained(anchors, crowd, 4).all()


def test_batch_without_boxes_has_no_loss() -> None:
    labels = torch.full((3, 2, 7), -1.0)
    assert float(build("mimic", {"variant": "l2"})(Batch(features(0), [features(1)], labels))["mimic"]) == 0


@pytest.mark.parametrize(
    ("name", "settings", "teacher", "message"),
    [
        ("mimic", {}, two_stage(), r"compares detectors of one kind, .* Use --method pkd\."),
        ("pkd", {}, shapes(12), "6 channels in the student and 12 in the teacher"),
        ("mimic", {}, shapes(12), "must have equal levels and widths"),
        ("mimic", {}, shapes(towers=False), "teacher none"),
        ("mimic", {"variant": "lshl2_s"}, None, "does not apply to detectors"),
        ("mimic", {"bias": "mean"}, None, "mimic.bias=mean has no effect with detectors"),
    ],
)
def test_unsuitable_detectors_and_settings_are_refused(
    name: str, settings: dict[str, object], teacher: Shapes | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(name, settings, teacher)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "wttm", "sdd", "itrd", "feed"])
def test_methods_for_whole_images_name_the_ones_for_detectors(name: str) -> None:
    with pytest.raises(UsageError, match=r"does not support detection data: .* Use quest or mimic or pkd\."):
        methods.check_task(methods.parse_parameters([name], {}), "detection")


def test_networks_without_a_feature_are_refused_by_the_methods_name() -> None:
    parameters = methods.parse_parameters(["mimic"], {})
    names = ["ssdlite:mobilenetv2_050"], "ssdlite:mobilenetv2_050"
    with pytest.raises(ModelError, match=r"^--method mimic does not suit .* has no feature 'vector'"):
        check_methods(parameters, *names, classes=2, image_size=64, images=10)


def test_quest_reads_all_levels_by_default() -> None:
    quest, parameters = methods.load("quest"), methods.parse_parameters(["quest"], {})["quest"]
    assert quest.reads(parameters, shapes()) == {"map@0", "map@1"}
    assert quest.reads(parameters, Shapes({"map": (6, 4, 4)}, None, 2)) == {"map"}


def test_detectors_of_two_kinds_share_their_maps_alone() -> None:
    names = ["fasterrcnn:mobilenetv2_050"], "retinanet:mobilenetv2_050"
    check = partial(check_methods, classes=2, image_size=64, images=10)
    check(methods.parse_parameters(["pkd"], {}), *names)
    with pytest.raises(UsageError, match="--method mimic compares detectors of one kind"):
        check(methods.parse_parameters(["mimic"], {}), *names)
    check(methods.parse_parameters(["mimic", "pkd"], {}), names[0], names[0][0])
