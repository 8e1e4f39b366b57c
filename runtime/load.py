"""From a path to a session: which backend runs what lies there."""

import logging
import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from motrt.errors import BackendError, BundleError, CheckpointError, InputError
from motrt.model_def.graph import CANONICAL
from motrt.runtime.backends import ORDER, probe
from motrt.runtime.bundle import Bundle, is_bundle, open_bundle
from motrt.runtime.gpu import find_gpus
from motrt.runtime.known_answer import check_answer
from motrt.runtime.session import Session
from motrt.runtime.tensorrt_library import FLAVOURS
from motrt.runtime.tokenizer import read_tokenizer
from motrt.runtime.versions import refuse_older

BACKENDS = ("auto", *ORDER)
RUNNING_BACKENDS = tuple(one for one in ORDER if one != "torch")  # those that run what a bundle holds

CHECKS = ("size", "hash", "answer")

MOST_THREADS = 4096

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    backend: str = "auto",
    check: str | Collection[str] = "size",
    num_threads: int = 0,
    checkpoint: str | Path | None = None,
) -> Session:
    """Open a bundle (or, with the torch backend, a native checkpoint) for use.

    Args:
        path: a bundle's folder; for ``backend="torch"`` also a checkpoint's.
        backend: ``auto`` takes the best that a known-answer run finds usable here and the bundle is made for (and torch for a
            checkpoint); ``tensorrt`` and ``tensorrt-rtx`` run the bundle's engines, ``cuda`` its graphs in onnxruntime on a
            GPU, ``onnxruntime`` on the CPU; ``torch`` is the reference, from the bundle's source checkpoint.
        check: ``size`` compares the files' sizes, ``hash`` reads every byte before anything is loaded, ``answer`` compares
            sizes and then asks the session the bundle's question: one that does not give the known answer is refused. Several
            are given together, as in ``("hash", "answer")`` or ``"hash,answer"``: an answer says little about a few weights.
        num_threads: for products; 0: one per core. Ignored by torch.
        checkpoint: what the bundle was made of, for ``torch``; None: where the manifest says it lay.

    Returns:
        A session: a context manager that holds the weights until it is closed.

    Raises:
        InputError: for another backend or check, an impossible number of threads, or where there can be no known answer: of a
            checkpoint, and of the torch backend for a quantised bundle.
        BundleError: when the bundle is missing, damaged or newer than this version, or carries no answer to check.
        CheckpointError: when the torch backend finds no checkpoint, or another than the bundle was made of.
        BackendError: when the library that the backend needs is not installed, or can not run the graph.
        ParityError: when the session does not give the known answer.
    """
    folder = Path(path)
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)} ({backend!r} came)")
    checks = checks_of(check)
    if not isinstance(num_threads, int) or not 0 <= num_threads <= MOST_THREADS:
        raise InputError(f"num_threads must be a whole number in 0..{MOST_THREADS}, 0: one per core ({num_threads!r} came)")
    if not is_bundle(folder) and (backend == "torch" or (backend == "auto" and os.path.lexists(folder / "config.json"))):
        if "answer" in checks:
            raise InputError(f"{folder} is a checkpoint, and bundles alone carry a known answer: make one with `motrt export`")
        return _with_tokenizer(*_torch_session(folder))
    bundle = open_bundle(folder, "hash" if "hash" in checks else "size")
    if "answer" in checks:
        _refuse_unanswerable(bundle, backend)
    tokenizer = bundle.tokenizer_path
    if backend == "torch":
        session, beside = _torch_session(Path(checkpoint) if checkpoint is not None else source_of(bundle), bundle)
        tokenizer = tokenizer or beside
    else:
        session = best_session(bundle, num_threads) if backend == "auto" else open_session(bundle, backend, num_threads)
    return _with_tokenizer(_answering(session, bundle) if "answer" in checks else session, tokenizer)


def checks_of(check: str | Collection[str]) -> frozenset[str]:
    """What ``check`` of ``load`` asks for: one check, several with commas between, or several in a collection.

    Raises:
        InputError: for another check, and for none.
    """
    named = [one.strip() for one in check.split(",")] if isinstance(check, str) else check
    if not isinstance(named, Collection) or not named or any(one not in CHECKS for one in named):
        told = f"check must be {', '.join(map(repr, CHECKS[:-1]))} or {CHECKS[-1]!r} ({check!r} came)"
        raise InputError(f"{told}: one of them, or several with commas between")
    return frozenset(named)


def _refuse_unanswerable(bundle: Bundle, backend: str) -> None:
    """Say before anything is loaded that there is no answer to hold a session against."""
    if bundle.manifest.answer is None:
        raise BundleError(
            f"{bundle.path} carries no known answer: it was exported by an older motrt, or its model says no numbers. Export "
            "it again, or check it by 'size' or 'hash' and prove it with `motrt verify`"
        )
    if backend == "torch" and bundle.manifest.quantization is not None:
        raise InputError(
            f"the torch backend holds the checkpoint's own weights, and the known answer is what the {bundle.manifest.weights} "
            "weights of this bundle say: check it with another backend, or load torch without check='answer'"
        )


def _answering(session: Session, bundle: Bundle) -> Session:
    """``session``, if it gives the bundle's answer; else it is closed, and ParityError."""
    assert bundle.manifest.answer is not None
    try:
        check_answer(session, bundle.manifest.answer, bundle.manifest.versions)
    except BaseException:
        session.close()
        raise
    return session


def best_session(bundle: Bundle, num_threads: int = 0) -> Session:
    """The best backend that can be used here and that the bundle is made for, without its tokenizer.

    What was passed over, and why, is logged.

    Raises:
        BackendError: where there is none, with every reason.
    """
    reasons = []
    for name in ORDER[: ORDER.index("onnxruntime")]:
        reason = why_not(bundle, name)
        if not reason:
            try:
                return open_session(bundle, name, num_threads)
            except (BackendError, MemoryError, OSError) as failure:
                reason = str(failure)
        logger.info("%s is passed over: %s", name, reason)
        reasons.append(f"{name}: {reason}")
    try:
        return open_session(bundle, "onnxruntime", num_threads)
    except BackendError as failure:
        if find_gpus().first is None:  # then the reasons above are one, and not why
            raise
        raise BackendError("\n  - ".join([f"no backend runs {bundle.path} here:", *reasons, str(failure)])) from failure


def why_not(bundle: Bundle, backend: str) -> str:
    """Why ``backend`` can not run ``bundle`` here; empty where nothing speaks against it."""
    flavours = {one.flavour for one in bundle.manifest.engines}
    if backend in FLAVOURS and backend not in flavours:
        return f"the bundle holds no engines for it (motrt export --target {backend} makes some)"
    return probe(backend).reason


def open_session(bundle: Bundle, backend: str, num_threads: int = 0) -> Session:
    """Open ``bundle`` in one backend other than torch, without its tokenizer.

    Raises:
        InputError: for a backend that runs no bundle.
        BackendError: when it can not be used here, or not for this bundle.
        BundleError: when graph or engine is not the one that the manifest describes.
    """
    if backend in FLAVOURS:
        from motrt.runtime.trt_session import TrtSession

        return TrtSession(bundle, backend)
    if backend == "cuda":
        reason = probe("cuda").reason
        if reason:
            raise BackendError(f"onnxruntime can not run on a GPU here: {reason}")
        return cuda_session(bundle)
    if backend == "onnxruntime":
        return onnx_session(bundle, num_threads)
    raise InputError(f"backend must be one of {', '.join(RUNNING_BACKENDS)} ({backend!r} came)")


def source_of(bundle: Bundle) -> Path:
    """The folder of the checkpoint that ``bundle`` was exported from, where the manifest says it lay.

    Raises:
        CheckpointError: when it is no longer there.
    """
    source = Path(bundle.manifest.source["path"])
    if not source.is_dir():
        raise CheckpointError(
            f"the checkpoint that this bundle was made of is not at {source} any more: say where it is, with --checkpoint of "
            "`motrt verify` or checkpoint=... of motrt.load"
        )
    return source


def other_ways(bundle: Bundle, backend: str) -> dict[str, Callable[[], Session]]:
    """By name, how ``backend`` runs ``bundle`` where something that it usually takes is missing."""
    if backend != "cuda" or bundle.manifest.quantization is not None:
        return {}
    return {"onnxruntime's kernels": partial(cuda_session, bundle, step_kernels=False)}


def cuda_session(bundle: Bundle, step_kernels: bool = True) -> Session:
    """The bundle's graphs in onnxruntime on the first GPU, without its tokenizer; raises as ``onnx_session``.

    Args:
        bundle: what to open.
        step_kernels: whether steps take this package's own kernels, where they can.
    """
    from motrt.runtime.onnx_cuda_session import CudaOnnxSession

    steps = [graph for graph in bundle.manifest.graphs if graph.takes_one_token]
    session = CudaOnnxSession(
        bundle.model_path,
        bundle.config,
        graphs=(*steps, CANONICAL),
        weights=bundle.manifest.shared_weights,
        step_kernels=step_kernels,
    )
    return _as_the_manifest_says(session, bundle)


def onnx_session(bundle: Bundle, num_threads: int = 0) -> Session:
    """The bundle's canonical graph, which serves every mix, in onnxruntime on the CPU, without its tokenizer.

    Raises:
        BackendError: when onnxruntime is not installed or can not run the graph.
        BundleError: when the graph is not the one that the manifest describes.
    """
    from motrt.runtime.onnx_session import OnnxSession

    if bundle.manifest.precision == "bf16":
        raise BackendError(
            "onnxruntime's CPU kernels have no bfloat16: run this bundle on a GPU, or export with --precision fp32 or fp16"
        )
    session = OnnxSession(bundle.model_path, bundle.config, num_threads, quantization=bundle.manifest.quantization)
    return _as_the_manifest_says(session, bundle)


def _as_the_manifest_says(session: Session, bundle: Bundle) -> Session:
    session.weights = bundle.manifest.weights
    if session.precision != bundle.manifest.precision:
        session.close()
        raise BundleError(f"the graph is {session.precision} and the manifest says {bundle.manifest.precision}: export again")
    return session


def _torch_session(folder: Path, bundle: Bundle | None = None) -> tuple[Session, Path | None]:
    """The checkpoint in ``folder``; where it stands for a bundle, the very one, at the bundle's length."""
    refuse_older("torch")
    try:
        from motrt.model_def.checkpoint.native import open_checkpoint
        from motrt.runtime.torch_session import TorchSession
    except ImportError as missing:
        raise BackendError(
            f"the torch backend needs PyTorch ({missing}): install it with `pip install 'motrt[export]'`"
        ) from missing
    checkpoint = open_checkpoint(folder)
    if bundle is None:
        return TorchSession.open(checkpoint), checkpoint.tokenizer_path
    if checkpoint.sha256() != bundle.manifest.source["sha256"]:
        raise CheckpointError(f"{folder} is not the checkpoint that {bundle.path} was made of (its hash differs): export again")
    if (weights := bundle.manifest.weights or bundle.manifest.precision) != "fp32":
        logger.warning("the torch backend runs the checkpoint in fp32, and not the %s weights of %s", weights, bundle.path)
    return TorchSession.open(checkpoint, max_seq_len=bundle.config.max_seq_len), checkpoint.tokenizer_path


def _with_tokenizer(session: Session, path: Path | None) -> Session:
    try:
        session.tokenizer = None if path is None else read_tokenizer(path)
    except BundleError:
        session.close()
        raise
    return session
