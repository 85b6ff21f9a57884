"""Detectors: a timm backbone, a feature pyramid, and heads, losses and decoding of torchvision."""
