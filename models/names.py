"""Resolve model names: timm's own and short aliases, with suggestions for misspellings."""

import fnmatch
import re
from difflib import SequenceMatcher

from .errors import UnknownModel

# Never a name that timm has itself.
ALIASES: dict[str, str] = {
    "mobilenet": "mobilenetv2_100",
    "mobilenetv1": "mobilenetv1_100",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv3": "mobilenetv3_large_100",
    "mobilenetv3_large": "mobilenetv3_large_100",
    "mobilenetv3_small": "mobilenetv3_small_100",
    "mobilenetv4": "mobilenetv4_conv_small",
    "mobilenetv4_small": "mobilenetv4_conv_small",
    "mobilenetv4_medium": "mobilenetv4_conv_medium",
    "mobilenetv4_large": "mobilenetv4_conv_large",
    "mobilevit": "mobilevit_s",
    "efficientnet": "efficientnet_b0",
    "efficientnet_lite": "efficientnet_lite0",
    "efficientnetv2": "efficientnetv2_rw_s",
    "mnasnet": "mnasnet_100",
    "ghostnet": "ghostnet_100",
    "ghostnetv2": "ghostnetv2_100",
    "resnet": "resnet50",
    "wide_resnet50": "wide_resnet50_2",
    "resnext50": "resnext50_32x4d",
    "regnety": "regnety_016",
    "regnetx": "regnetx_016",
    "repvgg": "repvgg_a2",
    "densenet": "densenet121",
    "convnext": "convnext_tiny",
    "convnextv2": "convnextv2_tiny",
    "swin": "swin_tiny_patch4_window7_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "vit": "vit_base_patch16_224",
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "dinov2_small": "vit_small_patch14_dinov2",
    "dinov2_base": "vit_base_patch14_dinov2",
    "dinov2_large": "vit_large_patch14_dinov2",
    "dinov3_small": "vit_small_patch16_dinov3",
    "dinov3_base": "vit_base_patch16_dinov3",
    "dinov3_large": "vit_large_patch16_dinov3",
}

# Letters and digits that are often confused: resnet5O, mobi1enet.
_LOOK_ALIKES = str.maketrans("oil", "011")


def register() -> None:
    """Register the CIFAR networks with timm. Calling it again does nothing."""
    from .cifar import mobilenet, resnet, shufflenet, vgg, wide_resnet  # noqa: F401


def list_architectures() -> list[str]:
    """Return all architectures that can be built, without aliases and pretrained tags, in natural order."""
    import timm

    register()
    return list(timm.list_models())


def resolve(name: str) -> str:
    """Return timm's name for a name typed by the user, with its pretrained tag (`resnet50.a1_in1k`) if any.

    Raises UnknownModel with the nearest names, or with the existing tags if only the tag is wrong.
    """
    import timm

    register()
    typed = name.strip()
    architecture, _, tag = typed.partition(".")
    architecture = ALIASES.get(architecture, architecture)
    if not architecture or not timm.is_model(architecture):
        raise UnknownModel(_describe_unknown(typed))
    full = f"{architecture}.{tag}" if tag else architecture
    full = _current_name(full, typed)
    architecture, _, tag = full.partition(".")
    tags = tags_of(architecture)
    if tag and tag not in tags:
        offer = f"Choose from {', '.join(tags)}" if tags else "Omit the tag"
        raise UnknownModel(f"Model {architecture} has no pretrained tag {tag!r}. {offer}.")
    return full


def tags_of(architecture: str) -> list[str]:
    """Return the pretrained tags that timm lists for an architecture, the default first."""
    import timm

    names = timm.models.get_arch_pretrained_cfgs(architecture)
    return [name.partition(".")[2] for name in names if "." in name]


def find_matching(pattern: str = "*") -> list[str]:
    """Return names and aliases that match a shell pattern (`mobilenet*`); a plain word matches anywhere."""
    pattern = pattern.strip().lower() or "*"
    if not re.search(r"[*?\[]", pattern):
        pattern = f"*{pattern}*"
    names = {*list_architectures(), *ALIASES}
    return sorted((name for name in names if fnmatch.fnmatchcase(name.lower(), pattern)), key=_natural)


def find_nearest(name: str, count: int = 4) -> list[str]:
    """Return up to `count` names most similar to a misspelled one, ignoring case and punctuation."""
    typed = _normalize(name.partition(".")[0])
    if not typed:
        return []
    scored = []
    for candidate in {*list_architectures(), *ALIASES}:
        key = _normalize(candidate)
        matcher = SequenceMatcher(None, typed, key)
        if matcher.real_quick_ratio() < 0.5:
            continue
        # A truncated name ("efficientnet_lit") is nearer than its ratio.
        score = matcher.ratio() + (0.25 if key.startswith(typed) else 0.0)
        if score >= 0.6:
            scored.append((-score, candidate not in ALIASES, len(candidate), candidate))
    return [candidate for *_, candidate in sorted(scored)[:count]]


def _describe_unknown(typed: str) -> str:
    if not typed:
        return "The model name is empty. `compress models` lists all names."
    if near := find_nearest(typed):
        return f"Unknown model {typed!r}. Did you mean {', '.join(near)}?"
    return f"Unknown model {typed!r}. `compress models` lists all names."


def _current_name(full: str, typed: str) -> str:
    """Return the current name of a renamed model. Raises UnknownModel if timm has removed it."""
    from timm.models import _registry

    renamed: dict[str, str | None] = _registry._deprecated_models
    architecture, _, tag = full.partition(".")
    if architecture not in renamed:
        return full
    current = renamed[architecture]
    if current is None:
        raise UnknownModel(f"timm has removed model {typed!r}. `compress models` lists all names.")
    return f"{current.partition('.')[0]}.{tag}" if tag else current


def _normalize(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).translate(_LOOK_ALIKES)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    ]
