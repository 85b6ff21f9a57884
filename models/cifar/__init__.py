"""CIFAR networks of the CRD benchmark: the part of timm's model interface that all share, and registration.

Architectures and parameter names are those of Tian, Krishnan, Isola, "Contrastive Representation
Distillation", ICLR 2020 (github.com/HobbitLong/RepDistiller), so that its checkpoints load as they are.
"""

from collections.abc import Callable, Iterator
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

CRD_MEAN, CRD_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class CifarNetwork(nn.Module):
    """A network for small images with timm's interface; subclasses define layers and `levels`."""

    classifier_name: str = "fc"
    classifier_std: float | None = None
    """Standard deviation of the classifier's initial weights, with biases of 0; None for torch's default."""
    num_features: int
    head_hidden_size: int
    num_classes: int
    feature_info: list[dict[str, Any]]

    def levels(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the map [B,C,H,W] at the end of each resolution; the last one is pooled."""
        raise NotImplementedError

    def _finish(self, widths: list[int], reductions: list[int], num_classes: int) -> None:
        """Set the classifier and the attributes that timm reads, from widths and reductions of the levels."""
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"level{index}"}
            for index, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
        ]
        self.num_features = self.head_hidden_size = widths[-1]
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer, or an identity for a network without classes."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Create a new classifier; 0 classes for none. Only average pooling ("avg") is supported."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"the CIFAR networks pool by average only, not {global_pool!r}")
        self.num_classes = num_classes
        layer = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        if isinstance(layer, nn.Linear) and self.classifier_std is not None:
            nn.init.normal_(layer.weight, std=self.classifier_std)
            nn.init.zeros_(layer.bias)
        parent, _, child = self.classifier_name.rpartition(".")
        if parent:
            setattr(self, parent, nn.Sequential(layer))
        else:
            setattr(self, child, layer)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map [B,C,h,w], after its ReLU, of images [B,3,H,W]."""
        for level in self.levels(x):
            last = level
        return last

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B,N], or the penultimate vector [B,C], of the last map [B,C,h,w]."""
        vector = self.global_pool(x).flatten(1)
        return vector if pre_logits else self.get_classifier()(vector)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of the requested levels as timm does; `norm` has no effect."""
        if output_fmt != "NCHW":
            raise ValueError("the CIFAR networks return maps as NCHW only")
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        taken = []
        for index, last in enumerate(self.levels(x)):
            if index in take:
                taken.append(last)
            if stop_early and index == deepest:
                break
        return taken if intermediates_only else (last, taken)


def kaiming(network: nn.Module) -> None:
    """Initialize as the benchmark does: convolutions N(0, √(2/fan_out)), biases 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def register_variants(
    module: dict[str, Any], network: type[CifarNetwork], variants: dict[str, dict[str, Any]], **cfg: Any
) -> None:
    """Register variants (name → constructor arguments) as timm models of the module with these globals.

    `cfg` overrides the defaults: 32-pixel images, normalized as in the benchmark.
    """
    pretrained_cfg = {
        "input_size": (3, 32, 32),
        "num_classes": 100,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CRD_MEAN,
        "std": CRD_STD,
        "first_conv": "conv1",
        "classifier": network.classifier_name,
        "origin_url": "https://github.com/HobbitLong/RepDistiller",
        "paper_ids": "arXiv:1910.10699",
        **cfg,
    }
    default_cfgs = module.setdefault("default_cfgs", {})
    for name, shape in variants.items():
        default_cfgs.update(generate_default_cfgs({name: pretrained_cfg}))
        register_model(_entrypoint(name, module["__name__"], network, shape))


def _entrypoint(
    name: str, module: str, network: type[CifarNetwork], shape: dict[str, Any]
) -> Callable[..., CifarNetwork]:
    def create(pretrained: bool = False, **kwargs: Any) -> CifarNetwork:
        built: CifarNetwork = build_model_with_cfg(network, name, pretrained, **{**shape, **kwargs})
        return built

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    return create
