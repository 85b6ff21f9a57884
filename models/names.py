"""Model names: timm's own, the short ones people type, and the nearest ones to a misspelling."""

import fnmatch
import re
from difflib import SequenceMatcher

from .errors import UnknownModel

# What people type → timm's name. A name that timm itself knows never stands here.
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

# Letters and digits that are taken for one another in print: resnet5O, mobi1enet.
_LOOK_ALIKES = str.maketrans("oil", "011")


def register() -> None:
    """Make the CIFAR networks known to timm. Calling it again does nothing."""
    from .cifar import mobilenet, resnet, shufflenet, vgg, wide_resnet  # noqa: F401


def known() -> list[str]:
    """Every architecture that can be built, without aliases and pretrained tags, in natural order."""
    import timm

    register()
    return list(timm.list_models())


def resolve(name: str) -> str:
    """timm's name for what the user typed, its pretrained tag (`resnet50.a1_in1k`) kept.

    Raises UnknownModel with the nearest names, or with the known tags when only the tag is wrong.
    """
    import timm

    register()
    typed = name.strip()
    architecture, _, tag = typed.partition(".")
    architecture = ALIASES.get(architecture, architecture)
    if not architecture or not timm.is_model(architecture):
        raise UnknownModel(_unknown(typed))
    full = f"{architecture}.{tag}" if tag else architecture
    full = _current(full, typed)
    architecture, _, tag = full.partition(".")
    tags = tags_of(architecture)
    if tag and tag not in tags:
        offer = f"its tags are {', '.join(tags)}" if tags else "it has none; leave the tag away"
        raise UnknownModel(f"The model {architecture} has no pretrained tag {tag!r}: {offer}.")
    return full


def tags_of(architecture: str) -> list[str]:
    """The pretrained tags timm lists for an architecture, its default first."""
    import timm

    found = timm.models.get_arch_pretrained_cfgs(architecture)
    return [key.partition(".")[2] for key in found if "." in key]


def matching(pattern: str = "*") -> list[str]:
    """Names, aliases included, that match a shell pattern (`mobilenet*`); a plain word matches anywhere."""
    wanted = pattern.strip().lower() or "*"
    if not re.search(r"[*?\[]", wanted):
        wanted = f"*{wanted}*"
    names = {*known(), *ALIASES}
    return sorted((name for name in names if fnmatch.fnmatchcase(name.lower(), wanted)), key=_natural)


def nearest(name: str, count: int = 4) -> list[str]:
    """Up to `count` known names that look most like a misspelled one; case, dashes and dots don't matter."""
    typed = _folded(name.partition(".")[0])
    if not typed:
        return []
    scored = []
    for candidate in {*known(), *ALIASES}:
        key = _folded(candidate)
        matcher = SequenceMatcher(None, typed, key)
        if matcher.real_quick_ratio() < 0.5:
            continue
        # A name cut short ("efficientnet_lit") is nearer than the letters alone say.
        score = matcher.ratio() + (0.25 if key.startswith(typed) else 0.0)
        if score >= 0.6:
            scored.append((-score, candidate not in ALIASES, len(candidate), candidate))
    return [candidate for *_, candidate in sorted(scored)[:count]]


def _unknown(typed: str) -> str:
    if not typed:
        return "The model's name is empty; `compress models` lists all names."
    near = nearest(typed)
    if near:
        return f"There is no model {typed!r}; the nearest are {', '.join(near)}."
    return f"There is no model {typed!r} and none like it; `compress models` lists all names."


def _current(full: str, typed: str) -> str:
    """The present name of one that timm has renamed; UnknownModel for one that it has dropped."""
    from timm.models import _registry

    renamed: dict[str, str | None] = _registry._deprecated_models
    architecture, _, tag = full.partition(".")
    if architecture not in renamed:
        return full
    current = renamed[architecture]
    if current is None:
        raise UnknownModel(f"timm has removed the model {typed!r}; `compress models` lists those it has.")
    return f"{current.partition('.')[0]}.{tag}" if tag else current


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).translate(_LOOK_ALIKES)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    ]
