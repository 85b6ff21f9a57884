"""Other packages' distillation as subjects for ``throughput.py``: torchdistill's and timm's, logits by KL.

Each is there as its users get it (PIL images in a DataLoader with the package's own transforms, fp32,
contiguous), on our data (rendered tensors, still fp32 and contiguous), and on our data at our precision and
layout. The teacher is always in eval mode. Their loops over batches are example scripts, which no package
holds: what those do with a batch is done here.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from questpress.pipeline.runs.device import Engine
from torch import Tensor, nn

from benchmarks.training.ours import LEARNING_RATE, Setting
from benchmarks.training.pictures import Pictures

REPEAT = 100
"""Times the images are repeated in an epoch, so that none ends while time is taken."""

TORCHDISTILL_WORKERS, TIMM_WORKERS = 16, 4
"""Worker processes in torchdistill's sample configurations, and timm's default."""

HOLDS = hasattr(signal, "SIGSTOP")
"""Whether worker processes can be held on this system; where they cannot, there are none."""


class Feed(Iterator[Any]):
    """Batches of a DataLoader, endlessly; its worker processes rest between ``begin`` and ``end``."""

    def __init__(self, batches: Iterable[Any]) -> None:
        before = set(multiprocessing.active_children())
        self.batches = batches
        self.source = iter(batches)
        self.first: Any = next(self.source)  # starts the workers
        self.workers = [
            child.pid for child in multiprocessing.active_children() if child not in before and child.pid
        ]
        self.end()

    def __next__(self) -> Any:
        if self.first is not None:
            first, self.first = self.first, None
            return first
        try:
            return next(self.source)
        except StopIteration:
            self.source = iter(self.batches)
            return next(self.source)

    def begin(self) -> None:
        self._signal("SIGCONT")

    def end(self) -> None:
        self._signal("SIGSTOP")

    def close(self) -> None:
        """Let the workers go, for good: held ones would never end."""
        self.begin()
        self.workers = []
        del self.source, self.batches

    def _signal(self, name: str) -> None:
        for pid in self.workers:
            os.kill(pid, getattr(signal, name))


class Equipped(nn.Module):
    """A network with its normalization, in an engine's precision and a layout: uint8 views in, logits out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, setting: Setting, name: str, engine: Engine) -> None:
        super().__init__()
        self.network = network.to(memory_format=engine.memory_format)
        self.engine = engine
        geometry = setting.geometry(name)
        for key in ("mean", "std"):
            values = torch.tensor(getattr(geometry, key)).view(1, 3, 1, 1)
            self.register_buffer(key, values, persistent=False)
        # timm's task reads these of both networks; they are equal, so nothing is left to normalize.
        self.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def forward(self, views: Tensor) -> Tensor:
        pixels = views.contiguous(memory_format=self.engine.memory_format)
        pixels = (pixels.to(torch.float32) / 255).sub_(self.mean).div_(self.std)
        with self.engine.autocast():
            logits: Tensor = self.network(pixels)
        return logits.float()


def _networks(setting: Setting, like_ours: bool | None) -> tuple[nn.Module, nn.Module]:
    """Teacher and student: as they are (None), on our data in fp32 and contiguous, or in all like ours."""
    pair = []
    for name, engine in ((setting.teacher, setting.teacher_engine), (setting.student, setting.engine)):
        network = setting.network(name)
        if like_ours is not None:
            plain = Engine(setting.device, setting.threads, "fp32", "contiguous")
            network = Equipped(network, setting, name, engine if like_ours else plain)
        pair.append(network.to(setting.device))
    teacher, student = pair
    return teacher.eval(), student.train()


def _pictures(setting: Setting) -> Pictures:
    return Pictures(setting.images, setting.size if setting.small else None, REPEAT)


def _workers(setting: Setting, at_most: int) -> int:
    return min(setting.workers, at_most) if HOLDS else 0


def torchdistill(setting: Setting, like_ours: bool | None, held: ExitStack) -> tuple[Callable[[], None], Any]:
    """A step with its DistillationBox, configured as its samples (CIFAR-100, ImageNet) are, and its feed.

    Args:
        like_ours: None as its users get it, False on our data, True in our precision and layout too.
        held: closes the feed.

    Raises:
        ImportError: it is not installed.
    """
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.misc.log import MetricLogger, SmoothedValue

    data = {"train": _torchdistill_data(setting)} if like_ours is None else {}
    teacher, student = _networks(setting, like_ours)
    device = torch.device(setting.device)
    ids = [device.index or 0] if device.type == "cuda" else None  # one GPU, as for all subjects
    configuration = _torchdistill_configuration(setting)
    box = get_distillation_box(teacher, student, data, configuration, device, ids, False, 1)
    box.pre_epoch_process(epoch=0)
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    feed = None
    if like_ours is None:
        feed = Feed(logger.log_every(box.train_data_loader, 1000, "Epoch: [0]"))
        held.callback(feed.close)
    batches: Iterator[Any] = feed or ((batch.pixels, batch.labels, {}) for batch in setting.stream())

    def step() -> None:
        images, labels, more = next(batches)
        images, labels = images.to(device), labels.to(device)
        loss = box.forward_process(images, labels, more)
        box.post_forward_process(loss=loss)
        logger.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        if torch.isnan(loss) or torch.isinf(loss):
            raise SystemExit("torchdistill's loss is no longer finite")

    return step, feed


def _torchdistill_data(setting: Setting) -> Pictures:
    from torchvision import transforms

    pictures = _pictures(setting)
    geometry = setting.geometry(setting.student)
    crop = (
        transforms.RandomCrop(setting.size, padding=4)
        if setting.small
        else transforms.RandomResizedCrop([setting.size, setting.size])
    )
    pictures.transform = transforms.Compose(
        [
            crop,
            transforms.RandomHorizontalFlip(0.5),
            transforms.ToTensor(),
            transforms.Normalize(geometry.mean, geometry.std),
        ]
    )
    return pictures


def _torchdistill_configuration(setting: Setting) -> dict[str, Any]:
    cifar = {"temperature": 4.0, "alpha": 0.9}
    imagenet = {"temperature": 1.0, "alpha": 0.5}
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": None},
            "kwargs": {
                "batch_size": setting.batch,
                "num_workers": _workers(setting, TORCHDISTILL_WORKERS),
                "pin_memory": setting.device.startswith("cuda"),
                "drop_last": False,
            },
        },
        "teacher": {
            "forward_proc": "forward_batch_only",
            "sequential": [],
            "wrapper": "DataParallel",
            "requires_grad": False,
        },
        "student": {
            "forward_proc": "forward_batch_only",
            "adaptations": None,
            "sequential": [],
            "wrapper": "DistributedDataParallel",
            "requires_grad": True,
            "frozen_modules": [],
        },
        "optimizer": {"key": "SGD", "kwargs": {"lr": LEARNING_RATE, "momentum": 0.9, "weight_decay": 0.0005}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {
                                "student_module_path": ".",
                                "student_module_io": "output",
                                "teacher_module_path": ".",
                                "teacher_module_io": "output",
                                "reduction": "batchmean",
                                **(cifar if setting.small else imagenet),
                            },
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }


def timm(setting: Setting, like_ours: bool | None, held: ExitStack) -> tuple[Callable[[], None], Any]:
    """A step with its LogitDistillationTask and, as its users get it, its loader's training defaults."""
    from timm.optim import create_optimizer_v2
    from timm.task import DistillationTeacher, LogitDistillationTask

    teacher, student = _networks(setting, like_ours)
    device = torch.device(setting.device)
    task = LogitDistillationTask(
        student, DistillationTeacher(teacher, device=device), temperature=4.0, device=device, verbose=False
    )
    task.train()
    optimizer = create_optimizer_v2(student, opt="sgd", lr=LEARNING_RATE, weight_decay=2e-5, momentum=0.9)
    feed = None
    if like_ours is None:
        feed = Feed(_timm_loader(setting, device))
        held.callback(feed.close)
    batches: Iterator[Any] = feed or ((batch.pixels, batch.labels) for batch in setting.stream())

    def step() -> None:
        images, labels = next(batches)
        result = task(images, labels)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()

    return step, feed


def _timm_loader(setting: Setting, device: torch.device) -> Any:
    from timm.data import create_loader

    geometry = setting.geometry(setting.student)
    return create_loader(
        _pictures(setting),  # type: ignore[arg-type]  # any map-style data set with a transform does
        (3, setting.size, setting.size),
        setting.batch,
        is_training=True,
        interpolation="random",
        mean=geometry.mean,
        std=geometry.std,
        num_workers=_workers(setting, TIMM_WORKERS),
        device=device,
    )
