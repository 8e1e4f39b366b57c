"""The first look at a GPU: is there anything that stands in the way, and what becomes of one small bundle.

    motrt init model --preset tiny64
    motrt export model standard --target cuda --precision bf16 --no-verify --operators standard
    python benchmarks/gpu_smoke.py --model model --bundle standard --json found.json

The bandwidth, a product whose answer is known, and of every bundle: which operators are not on the GPU, whether weights are
shared, how far a prefill and eight decode steps are from PyTorch on the same GPU, whether steps were captured, whether the
cache stayed where it was, and which kernels a step ran. Nothing ends it: what fails is in the document, with its traceback.
"""

import contextlib
import json
import os
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from motrt.benchmarks.document import leave, machine
from motrt.benchmarks.gpu_contender import error_of, measure_bandwidth, profiled
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.runtime.backends import SQUARE, probe, probe_all
from motrt.runtime.bundle import open_bundle
from motrt.runtime.gpu import find_gpus
from motrt.runtime.load import cuda_session
from motrt.runtime.torch_session import TorchSession

NUM_STEPS = 8
_QUERY = (
    "name,driver_version,memory.total,power.limit,power.draw,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,mig.mode.current"
)


@contextlib.contextmanager
def printed_by_libraries() -> Iterator[Callable[[], str]]:
    """What is written to file descriptor 2 meanwhile, by whatever library; it is written there afterwards, too."""
    with tempfile.TemporaryFile() as kept:
        real = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield lambda: (kept.seek(0), kept.read().decode(errors="replace"))[1]
        finally:
            os.dup2(real, 2)
            os.close(real)


def known_product() -> dict[str, Any]:
    """Onnxruntime's CUDA provider computes a product, its own log at the most verbose level kept where it does not."""
    found = probe("cuda").to_dict()
    if found["usable"]:
        return found
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 0
    with printed_by_libraries() as printed:
        with contextlib.suppress(Exception):
            ort.InferenceSession(SQUARE, options, providers=["CUDAExecutionProvider"])
        log = printed()
    lines = [line for line in log.splitlines() if "rror" in line or "rovider" in line]
    return found | {"log": lines[-40:]}


def mapped_libraries() -> list[str]:
    """CUDA's libraries as this process has mapped them."""
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text().split()
        names = ("cudart", "cublas", "cudnn", "libcuda.so", "onnxruntime")
        return sorted({path for path in maps if path.startswith("/") and any(name in path for name in names)})
    return []


def look_at(folder: Path, model: Path, device: str) -> dict[str, Any]:
    """One bundle, opened as production opens it, beside PyTorch in float32 on the same device."""
    bundle = open_bundle(folder)
    config, found = bundle.config, dict[str, Any]()
    reference = TorchSession.open(open_checkpoint(model), "fp32", device, config.max_seq_len)
    with printed_by_libraries() as printed:
        session: Any = cuda_session(bundle)
        found["log"] = printed().splitlines()[-40:]
    with session:
        found |= {"not_on_gpu": session.elsewhere, "shares_weights": session.shares, "no_kernels": session.no_kernels}
        for modality, name in enumerate(config.modality_names):
            ids = config.id_ranges[modality]
            prompt = [ids[(7 + 31 * place) % len(ids)] for place in range(24)]
            logits, cache = session.prefill([prompt], name)
            expected, other = reference.prefill([prompt], name)
            errors = [error_of(logits, expected, (modality,), config.id_ranges)]
            places = [value.data_ptr() for value in cache.buffers.held.buffers.values]
            for number in range(NUM_STEPS):
                one = [ids[(3 + number) % len(ids)]]
                got, right = session.decode_step(one, name, cache), reference.decode_step(one, name, other)
                errors.append(error_of(got, right, (modality,), config.id_ranges))
            held = cache.buffers.held
            written = np.array([value.numpy()[0].astype(np.float64).any(axis=(0, 2)).sum() for value in held.buffers.values])
            found[name] = {
                "errors": [round(one, 6) for one in errors],
                "captured": {graph.name: graph in session._recorded for graph in held.steps},
                "own_kernels": sorted(graph.name for graph in held.kernels),
                "cache_in_place": [value.data_ptr() for value in held.buffers.values] == places,
                "cache_device": sorted({value.device_name() for value in held.buffers.values}),
                "positions_written": sorted(set(written.tolist())),
                "kernels": profiled(lambda: session.decode_step([ids[0]], name, cache)) if device == "cuda" else {},  # noqa: B023
            }
        found["passes"] = session.passes
        found["captured"] = sorted(graph.name for graph in session._recorded)
    return found


def tried(document: dict[str, Any], name: str, look: Callable[[], Any], keep: Callable[[], None]) -> None:
    """One part of the document; a failure is its traceback."""
    try:
        document[name] = look()
    except Exception:
        document[name] = {"failed": traceback.format_exc()[-6000:]}
    keep()


def nvidia_smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    return dict(zip(_QUERY.split(","), map(str.strip, said.split(",")), strict=False))


def smoke(model: Path, bundles: tuple[Path, ...], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    document: dict[str, Any] = {
        "machine": machine("motrt", "torch", "numpy", "onnxruntime-gpu", "onnx", "onnx-ir", "polygraphy")
    }

    def kept() -> None:
        keep(document)

    tried(document, "gpu", lambda: vars(find_gpus().first) | {"cuda_of_driver": find_gpus().driver}, kept)
    tried(document, "nvidia_smi", nvidia_smi, kept)
    tried(document, "bandwidth_bytes_per_s", lambda: measure_bandwidth(torch.device("cuda")), kept)
    torch.cuda.empty_cache()
    tried(document, "known_product", known_product, kept)
    tried(document, "libraries", mapped_libraries, kept)
    for folder in bundles:
        tried(document, folder.name, lambda folder=folder: look_at(folder, model, "cuda"), kept)  # type: ignore[misc]
    tried(document, "backends", lambda: [one.to_dict() for one in probe_all()], kept)
    tried(document, "nvidia_smi_after", nvidia_smi, kept)
    return document


PATH = click.Path(path_type=Path)


@click.command()
@click.option("--model", type=PATH, required=True)
@click.option("--bundle", "bundles", type=PATH, multiple=True)
@click.option("--json", "json_file", type=PATH)
def main(model: Path, bundles: tuple[Path, ...], json_file: Path | None) -> None:
    """Look; one JSON document last. Exits with 1 where onnxruntime cannot compute on the GPU."""
    if (gpus := find_gpus()).first is None:
        raise click.ClickException(f"this looks at a GPU, and there is none: {gpus.reason}")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # torch's profiler beside CUDA graphs

    def keep(document: dict[str, Any]) -> None:
        if json_file is not None:
            json_file.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")

    document = json.loads(json.dumps(smoke(model, bundles, keep), default=str))
    leave(document, json_file)
    if not document["known_product"].get("usable"):
        reason = document["known_product"].get("reason", "see known_product")
        raise click.ClickException(f"onnxruntime cannot compute on the GPU: {reason}")


if __name__ == "__main__":
    main()
