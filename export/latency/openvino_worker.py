"""A bench worker for OpenVINO: the requests of `bench_worker`, another runtime.

`python -m questpress.export.latency.openvino_worker`; needs the package `openvino`.
"""

from __future__ import annotations

from .bench_worker import Run, serve


def main() -> None:
    serve(in_openvino)


def in_openvino(model: str, threads: int, shape: tuple[int, ...]) -> Run:
    """OpenVINO at its best for single images: a fixed shape, one stream, one request, inputs not copied."""
    import openvino as ov

    core = ov.Core()
    network = core.read_model(model)
    network.reshape(shape)
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    try:
        request = core.compile_model(network, "CPU", settings).create_infer_request()
    except RuntimeError as error:
        if "No suitable implementations" not in str(error):
            raise
        raise RuntimeError(
            "OpenVINO has no kernel for one of its layers on this processor; with "
            "ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI in the environment it leaves AMX aside"
        ) from error
    return lambda image: request.infer({0: image}, share_inputs=True)[0]


if __name__ == "__main__":
    main()
