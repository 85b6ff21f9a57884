"""What fuzz.py feeds: each reader of what others have written, with real inputs to begin from.

A target takes bytes and reads them, or raises the error that a command turns into a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns import fuzz_data as data
from tests.campaigns import fuzz_networks as networks
from tests.campaigns import fuzz_records as records


@dataclass(frozen=True)
class Target:
    """``seeds`` are real inputs; ``make`` gives the function that reads one, once everything is imported."""

    seeds: Callable[[], list[bytes]]
    make: Callable[[Path], Callable[[bytes], None]]


TARGETS = {
    "images": Target(data.image_seeds, data.images),
    "onnx": Target(networks.onnx_seeds, networks.onnx),
    "device": Target(networks.onnx_seeds, networks.device),
    "manifest": Target(networks.manifest_seeds, networks.manifest),
    "yaml": Target(
        lambda: [b"teacher: resnet50\nset: {quest.tau: 0.2}\na: &a [1]\nb: *a\n"], records.yaml_text
    ),
    "csv": Target(lambda: [b"file,labels,role\na.jpg,cat dog,train\n"], data.labels("csv")),
    "jsonl": Target(
        lambda: [b'{"file": "a.jpg", "labels": ["cat"], "role": "train"}\n'], data.labels("jsonl")
    ),
    "coco": Target(
        lambda: [
            b'{"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "cat"}], '
            b'"annotations": [{"image_id": 1, "category_id": 1}]}'
        ],
        data.labels("json"),
    ),
    "shards": Target(data.shard_seeds, data.shards),
    "json": Target(networks.manifest_seeds, records.json_text),
    "weights": Target(networks.weights_seeds, networks.weights),
    "run": Target(records.run_seeds, records.run),
    "store": Target(records.store_seeds, records.store),
}
