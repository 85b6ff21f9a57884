"""Decode images, preprocess them, and classify them or detect objects in them with an exported model.

It requires only numpy, Pillow and onnxruntime, runs on Python 3.8, and ships with every artifact, in which
`predict.py` exports the same names:

    classifier = Classifier.load("runs/shop")
    classifier.predict(["photo.jpg"])[0].label

    detector = Detector.load("runs/cells")
    detector.detect(["photo.jpg"])[0][0].box

Training and validation use the same functions, so that reported accuracies are those of the device.
"""

from .decode import (
    MAX_PIXELS,
    ImageSource,
    NeededSize,
    decode_image,
    readable_formats,
    suppress_pillow_warnings,
)
from .errors import ArtifactError, ImageError
from .manifest import (
    DETECTION,
    MANIFEST,
    MAX_FILE_BYTES,
    METADATA_PREFIX,
    MULTI_LABEL,
    UINT8,
    build_metadata,
    compute_checksum,
    decoder_metadata,
    read_manifest,
    read_verified,
)
from .models import Classifier, Detection, Detector, Model, Prediction, open_content, open_model
from .outputs import Decoder, sigmoid, softmax
from .preprocessing import (
    MAX_SIDE,
    SCHEMA_VERSION,
    Pixels,
    Preprocessing,
    Size,
    height_width,
    make_size,
    needed_size,
    normalize,
    place_crop,
    render,
    resized_size,
    to_original,
)
from .processor import (
    MAX_THREADS,
    allowed_cores,
    cgroup_folders,
    default_threads,
    detect_target,
    int8_flags,
    lacks_dot_products,
    runnable_targets,
)
from .session import CPU, DISABLED_OPTIMIZERS, ORT_SUFFIX, open_session, refuse_external_data

__all__ = [
    "CPU",
    "DETECTION",
    "DISABLED_OPTIMIZERS",
    "MANIFEST",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "MAX_THREADS",
    "METADATA_PREFIX",
    "MULTI_LABEL",
    "ORT_SUFFIX",
    "SCHEMA_VERSION",
    "UINT8",
    "ArtifactError",
    "Classifier",
    "Decoder",
    "Detection",
    "Detector",
    "ImageError",
    "ImageSource",
    "Model",
    "NeededSize",
    "Pixels",
    "Prediction",
    "Preprocessing",
    "Size",
    "allowed_cores",
    "build_metadata",
    "cgroup_folders",
    "compute_checksum",
    "decode_image",
    "decoder_metadata",
    "default_threads",
    "detect_target",
    "height_width",
    "int8_flags",
    "lacks_dot_products",
    "make_size",
    "needed_size",
    "normalize",
    "open_content",
    "open_model",
    "open_session",
    "place_crop",
    "read_manifest",
    "read_verified",
    "readable_formats",
    "refuse_external_data",
    "render",
    "resized_size",
    "runnable_targets",
    "sigmoid",
    "softmax",
    "suppress_pillow_warnings",
    "to_original",
]
