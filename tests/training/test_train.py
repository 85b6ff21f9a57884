"""The training loop on toy data: learning, reproducibility, checkpoints and schedules."""

import errno
import math
import os
from collections import Counter
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from questpress.models.build import geometry
from questpress.pipeline.data.views import ViewSchedule, method_keys
from questpress.pipeline.errors import JobError
from questpress.pipeline.runs.results import Epoch
from questpress.pipeline.training.distributed import Ranks
from questpress.pipeline.training.loop import Batch, BatchSource
from questpress.pipeline.training.optimizer import build_optimizer, build_scheduler
from questpress.pipeline.training.weights import Checkpoint

from tests.support.little import Calls
from tests.support.toys import (
    CLASSES,
    SIDE,
    batches,
    distillation,
    equal,
    learn,
    network,
    plan,
    save_each_step,
    state,
    supervised,
    views,
)


@pytest.mark.parametrize("make", [supervised, distillation])
def test_loss_goes_down(tmp_path, make):
    epochs = learn(make(), tmp_path / "c.pt", epochs=6)
    losses = [epoch.losses["loss"] for epoch in epochs]
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert losses[-1] < 0.7 * losses[0]
    accuracy = epochs[-1].train_accuracy
    assert accuracy is not None and accuracy > 80


def test_heads_of_a_method_learn_and_are_saved_but_are_not_in_the_network_that_ships(tmp_path):
    task = distillation()
    before = state(task)
    learn(task, tmp_path / "c.pt", epochs=1)
    assert set(task.network.state_dict()) == set(network().state_dict())
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["epoch"] == 1
    for name in ("quest.terms.0.weight", "quest.terms.0.gamma"):
        now = state(task)[f"methods.{name}"]
        assert torch.equal(saved["task_state"]["methods"][name], now)
        assert not torch.equal(now, before[f"methods.{name}"])
    optimized = sum(len(group["params"]) for group in saved["optimizer"]["param_groups"])
    assert optimized == len(list(task.trainable_module.parameters())) and not saved["optimizer"]["state"]


def test_finished_training_is_not_repeated(tmp_path):
    task = distillation()
    learn(task, tmp_path / "c.pt")
    again = distillation()
    assert learn(again, tmp_path / "c.pt") == []
    assert equal(state(again), state(task))


def test_checkpoint_of_another_training_is_not_used(tmp_path):
    learn(supervised(), tmp_path / "c.pt", epochs=1, key="another")
    assert len(learn(supervised(), tmp_path / "c.pt", epochs=1, key="this")) == 1


def test_damaged_checkpoint_is_reported(tmp_path):
    learn(supervised(), tmp_path / "c.pt", epochs=1)
    content = (tmp_path / "c.pt").read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1  # in the middle of a tensor, which torch does not check
    for damage in (content[: len(content) // 2], b"", b"no checkpoint at all", bytes(flipped)):
        (tmp_path / "c.pt").write_bytes(damage)
        (tmp_path / "c.previous.pt").unlink(missing_ok=True)
        with pytest.raises(JobError, match=r"c\.pt is damaged, and there is no other\. Delete it"):
            learn(supervised(), tmp_path / "c.pt", epochs=1)


@pytest.mark.parametrize("damage", ["a flipped bit", "half of it", "gone"])
def test_when_the_newest_checkpoint_is_damaged_the_one_before_it_is_used(tmp_path, monkeypatch, damage):
    save_each_step(monkeypatch)
    whole = distillation()
    learn(whole, tmp_path / "whole.pt", epochs=3)
    learn(distillation(), tmp_path / "c.pt", epochs=3)
    newest, before = tmp_path / "c.pt", tmp_path / "c.previous.pt"
    assert torch.load(before, weights_only=True)["epoch"] == 2
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":  # killed between the two renames
        newest.unlink()
    else:
        newest.write_bytes(content if damage == "a flipped bit" else content[:1000])
    messages: list[str] = []
    assert Checkpoint(newest, "key", messages.append).load("cpu")["epoch"] == 2
    assert messages == (
        []
        if damage == "gone"
        else [f"The checkpoint {newest} is damaged. Training resumes from the previous one."]
    )
    resumed = distillation()
    assert [epoch.epoch for epoch in learn(resumed, newest, epochs=3)] == [3]
    assert equal(state(resumed), state(whole))


def test_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    learn(distillation(), tmp_path / "c.pt", epochs=2)
    messages: list[str] = []
    for error in (OSError(errno.EIO, "Input/output error"), MemoryError()):
        with monkeypatch.context() as faulty:
            faulty.setattr(torch, "load", Mock(side_effect=error))
            with pytest.raises(type(error)):
                Checkpoint(tmp_path / "c.pt", "key", messages.append).load("cpu")
    assert Checkpoint(tmp_path / "c.pt", "key", messages.append).load("cpu")["epoch"] == 2 and messages == []


def test_checkpoint_never_runs_code(tmp_path):
    Checkpoint(tmp_path / "c.pt", "key").save(
        {"epoch": 1, "extra": Calls(os.mkdir, str(tmp_path / "was_run"))}
    )
    with pytest.raises(JobError, match=r"c\.pt is damaged"):
        Checkpoint(tmp_path / "c.pt", "key").load("cpu")
    assert not (tmp_path / "was_run").exists()


def test_views_and_their_order_follow_from_seed_and_epoch_alone():
    def drawn(seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = batches(views(seed=seed), plan(seed=seed), epoch, 3)
        return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])

    first, labels = drawn(0, 0)
    assert first.shape == (24, 3, SIDE, SIDE) and first.dtype == torch.uint8
    assert sorted(labels.tolist()) == sorted([i % CLASSES for i in range(24)])
    torch.manual_seed(123)
    assert torch.equal(first, drawn(0, 0)[0])
    for other in (drawn(0, 1), drawn(1, 0)):
        assert not torch.equal(first, other[0]) and not torch.equal(labels, other[1])


@pytest.mark.parametrize("fixed", [None, 4])
def test_steps_have_the_same_labeled_images_and_others_in_a_new_view_in_each_pass(fixed):
    given, cache = views(31, labeled=24), Mock(batch=lambda *_: [])
    rows = {key: row for row, key in enumerate(method_keys(0, given.keys).tolist())}

    def drawn(unlabeled: int, epoch: int, begun: int = 0) -> list[Batch]:
        schedule, made = ViewSchedule(given.policy, given.seed, fixed), plan(unlabeled=unlabeled)
        source = BatchSource(given, schedule, cache, made, Ranks(), torch.device("cpu"))
        source.open(epoch)
        return list(source.batches(epoch, 3, begun))

    seen: Counter[int] = Counter()
    for epoch in range(7):
        opened = {epoch % (fixed or 99)}
        alone, both = drawn(0, epoch), drawn(5, epoch)
        for some, labeled in zip(both, alone, strict=True):
            assert len(some) == 13 and torch.equal(some.labels, labeled.labels)
            assert torch.equal(some.pixels[:8], labeled.pixels) and torch.equal(some.keys[:8], labeled.keys)
            for key, pixels in zip(some.keys[8:].tolist(), some.pixels[8:], strict=True):
                number = seen[key] % (fixed or 99)
                assert given.batch(*torch.tensor([[rows[key]], [number]]))[0][0].equal(pixels)
                opened.add(number)
                seen[key] += 1
        cache.open.assert_called_with(sorted(opened))
        resumed = drawn(5, epoch, begun=2)[0]
        assert torch.equal(resumed.pixels, both[2].pixels)
    assert set(seen.values()) == {15} and len(seen) == 7  # 7 epochs of 3 steps of 5 images


def test_cross_entropy_is_the_mean_over_the_labeled_images_and_the_methods_loss_over_all():
    images, labels = views().batch(torch.arange(24), torch.zeros(24, dtype=torch.int64))
    task = distillation().eval()
    alone, every = task(images[:6], labels[:6]), task(images, labels)
    task.student.labeled_fraction = 0.25
    result = task(images, labels[:6])
    assert result["ce"].item() == pytest.approx(alone["ce"].item(), rel=1e-5)
    assert result["quest"].item() == every["quest"].item()


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save_each_step(monkeypatch)
    task = distillation()
    kept: dict[str, torch.Tensor] = {}

    def poison(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            kept.update(state(task))

            def broken(*_: Any) -> torch.Tensor:
                return torch.tensor(math.nan, requires_grad=True)

            task.trainable_module.methods["quest"].terms[0].forward = broken

    with pytest.raises(JobError) as raised:
        learn(task, tmp_path / "c.pt", log=poison, epochs=4)
    message = str(raised.value)
    assert "nan in epoch 3" in message and "quest" in message and "--lr" in message
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["epoch"] == 2
    good = {key.removeprefix("readouts.network."): value for key, value in kept.items()}
    assert all(torch.equal(value, good[key]) for key, value in saved["state_dict"].items())


def test_learning_rate_far_too_high_leaves_only_finite_weights_in_the_checkpoint(tmp_path, monkeypatch):
    save_each_step(monkeypatch)
    with pytest.raises(JobError, match="Try a lower --lr"):
        learn(supervised(), tmp_path / "c.pt", lr=1e30, optimizer="sgd", warmup_epochs=0, epochs=30)
    if (tmp_path / "c.pt").exists():
        saved = torch.load(tmp_path / "c.pt", weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in saved.values())


def test_epoch_has_full_batches_and_a_batch_larger_than_the_data_is_all_of_it(tmp_path):
    assert plan(batch_size=8).steps(31) == 3
    [epoch] = learn(supervised(), tmp_path / "c.pt", given=views(10), batch_size=64, epochs=1)
    assert plan(batch_size=64).steps(10) == 1
    [(images, labels)] = batches(views(10), plan(batch_size=64), 0, 1)
    assert len(images) == len(labels) == 10
    assert math.isfinite(epoch.losses["loss"])


def test_teacher_stays_in_eval_mode(tmp_path):
    task = distillation()
    teacher = task.teachers[0]
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    learn(task, tmp_path / "c.pt", epochs=2)
    assert not any(module.training for module in teacher.modules())
    assert equal(before, dict(teacher.state_dict()))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert task.network.training


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_with_its_weight_and_smoothing(smoothing):
    task = supervised(label_smoothing=smoothing, weights={"ce": 0.5})
    [(images, labels), *_] = batches(views(), plan(), 0, 1)
    task.eval()
    result = task(images, labels)
    g = geometry("cifar_resnet8", SIDE)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (g.mean, g.std))
    logits = task.network((images.float() / 255 - mean) / std)
    expected = 0.5 * F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert result["ce"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert result["loss"].item() == result["ce"].item()


def test_each_loss_has_its_weight_and_the_loss_is_their_sum():
    [(images, labels), *_] = batches(views(), plan(), 0, 1)
    plain = distillation().eval()(images, labels)
    weighted = distillation(weights={"ce": 0.25, "quest": 3.0}).eval()(images, labels)
    assert weighted["ce"].item() == pytest.approx(0.25 * plain["ce"].item(), rel=1e-6)
    assert weighted["quest"].item() == pytest.approx(3 * plain["quest"].item(), rel=1e-6)
    assert weighted["loss"].item() == pytest.approx(
        weighted["ce"].item() + weighted["quest"].item(), rel=1e-6
    )
    alone = distillation(weights={"ce": 0.0})(images, labels)
    assert "ce" not in alone and alone["loss"].item() == alone["quest"].item()


def compute_rates(steps: int, **changes: Any) -> list[float]:
    """Return the learning rate of each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=changes.get("lr", 2e-3))
    p = plan(**changes)
    scheduler = build_scheduler(optimizer, p, steps)
    rates = []
    for step in range(p.epochs * steps):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_learning_rate_rises_then_falls_along_a_cosine_to_zero():
    rates = compute_rates(10, epochs=10, warmup_epochs=2, lr=1.0)
    assert rates[0] == pytest.approx(0.01)
    assert all(b > a for a, b in pairwise(rates[:20]))
    assert all(b < a for a, b in pairwise(rates[20:]))
    for step in (20, 55, 99):
        assert rates[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * step / 100)), abs=0.02)


def test_multistep_divides_the_rate_by_ten_at_each_milestone():
    rates = compute_rates(4, epochs=6, warmup_epochs=0, lr=1.0, schedule="multistep", milestones=(2, 4))
    # timm counts a step ahead: the last step of the epoch before is the first at the lower rate.
    assert rates == pytest.approx([1.0] * 7 + [0.1] * 8 + [0.01] * 9)


def test_constant_learning_rate_is_constant_after_warmup():
    rates = compute_rates(4, epochs=6, warmup_epochs=1, lr=0.5, schedule="constant")
    assert rates[4:] == pytest.approx([0.5] * 20) and rates[0] < 0.01


def test_one_cycle_is_torchs():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=50, pct_start=0.1, cycle_momentum=False
    )
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    rates = compute_rates(5, epochs=10, warmup_epochs=1, lr=1.0, schedule="onecycle")
    assert rates == pytest.approx(expected, rel=1e-9)
    assert compute_rates(1, epochs=1, warmup_epochs=0, lr=1.0, schedule="onecycle") == [1.0]


def test_biases_and_norms_are_not_decayed_by_default(tmp_path):
    for decay_all, expected in ((False, {0.0, 0.05}), (True, {0.05})):
        learn(supervised(), tmp_path / f"{decay_all}.pt", epochs=1, decay_all=decay_all)
        groups = torch.load(tmp_path / f"{decay_all}.pt", weights_only=True)["optimizer"]["param_groups"]
        assert {group["weight_decay"] for group in groups} == expected


def test_adaptive_optimizer_moves_a_learned_scale_as_sgd_would():
    """QuEST's γ has to rise from 3 to nearly 20, which takes an adaptive optimizer a larger learning rate."""
    for name, factor in (("adamw", 50.0), ("sgd", 1.0)):
        made = distillation()
        optimizer = build_optimizer(made, plan(optimizer=name))
        [group] = [g for g in optimizer.param_groups if any(p is made.scales()[0] for p in g["params"])]
        assert group["params"] == made.scales()
        assert group["lr_scale"] == factor
        assert group["weight_decay"] == 0.0
        everything = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert sorted(everything) == sorted(id(p) for p in made.trainable_module.parameters())


def test_damaged_previous_checkpoint_of_another_run_is_reported(tmp_path):
    newest = tmp_path / "c.pt"
    learn(supervised(), newest, epochs=2, key="another")
    newest.write_bytes(b"damaged")
    messages: list[str] = []
    assert Checkpoint(newest, "key", messages.append).load("cpu") is None
    assert len(messages) == 1 and "is damaged" in messages[0] and "starts from the beginning" in messages[0]
