"""Check the packages that the artifact requires, before they are imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys

PACKAGES = {"numpy": ("numpy", "1.21"), "PIL": ("pillow", "9.4"), "onnxruntime": ("onnxruntime", "1.15")}
"""Name in the package index, and lowest version, by name of the module."""


def check_packages() -> None:
    """Exit with a sentence if a package is missing or too old."""
    missing = [package for name, (package, _) in PACKAGES.items() if not importlib.util.find_spec(name)]
    if missing:
        sys.exit(f"Error: {', '.join(missing)} not installed. Run pip install {' '.join(missing)}")
    for name, (package, least) in PACKAGES.items():
        version = importlib.import_module(name).__version__
        if [int(part) for part in version.split(".")[:2]] < [int(part) for part in least.split(".")]:
            sys.exit(
                f"Error: {package} must be {least} or later, got {version}. Run pip install -U {package}"
            )
