"""A bench worker for OpenVINO: the requests of ``questpress.export.latency.bench_worker``, another runtime.

    python benchmarks/openvino_worker.py ALL

The word is the best instruction set that oneDNN inside it may use, in oneDNN's names.
"""

import os
import sys

import openvino as ov
from questpress.export.latency.bench_worker import Run, serve


def in_openvino(model: str, threads: int, shape: tuple[int, ...]) -> Run:
    """OpenVINO at its best for single images: a fixed shape, one stream, one request, inputs not copied."""
    core = ov.Core()
    network = core.read_model(model)
    network.reshape(shape)
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    return lambda image: request.infer({0: image}, share_inputs=True)[0]


if __name__ == "__main__":
    os.environ["ONEDNN_MAX_CPU_ISA"] = sys.argv[1]  # read at the first compilation
    serve(in_openvino)
