"""The reference as a session: the PyTorch decoder itself, from a checkpoint. The one file of this room that needs torch."""

from collections.abc import Sequence

import numpy as np
import torch

from motrt.model_def.checkpoint.container import TORCH_DTYPES, dtype_name
from motrt.model_def.checkpoint.native import Checkpoint
from motrt.model_def.decoder import Cache, Decoder
from motrt.model_def.signature import DTYPE_OF_PRECISION, PRECISION_OF_DTYPE
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs


class TorchSession(Session):
    """A decoder behind the session's calls.

    Args:
        decoder: in evaluation mode.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.config = decoder.config
        self.backend = f"torch ({decoder.device})"
        self.precision = PRECISION_OF_DTYPE[dtype_name(decoder.dtype)]

    @classmethod
    def open(
        cls, checkpoint: Checkpoint, precision: str = "fp32", device: str = "cpu", max_seq_len: int | None = None
    ) -> "TorchSession":
        """Load every weight of ``checkpoint``, converted to ``precision``.

        Args:
            checkpoint: what to load.
            precision: ``fp64``, ``fp32``, ``bf16`` or ``fp16``, of weights, activations and cache.
            device: where it runs.
            max_seq_len: most positions per row; None: the checkpoint's.
        """
        config = checkpoint.config if max_seq_len is None else checkpoint.config.replace(max_seq_len=max_seq_len)
        return cls(Decoder.from_tensors(config, checkpoint.read, TORCH_DTYPES[DTYPE_OF_PRECISION[precision]], device))

    def make_buffers(self, batch_size: int, capacity: int) -> Cache:
        return self.decoder.new_cache(batch_size, capacity)

    def grow_buffers(self, buffers: Cache, capacity: int) -> Cache:
        grown = self.decoder.new_cache(buffers[0][0].shape[0], capacity)
        for old_pair, new_pair in zip(buffers, grown, strict=True):
            for old, new in zip(old_pair, new_pair, strict=True):
                new[:, :, : old.shape[2]] = old
        return grown

    @torch.inference_mode()
    def join_buffers(self, rows: Sequence[tuple[Cache, int]], capacity: int) -> Cache:
        joined = self.decoder.new_cache(len(rows), capacity)
        for number, (buffers, row) in enumerate(rows):
            for old_pair, new_pair in zip(buffers, joined, strict=True):
                for old, new in zip(old_pair, new_pair, strict=True):
                    new[number, :, : old.shape[2]] = old[row, :, :capacity]
        return joined

    @torch.inference_mode()
    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        arguments = [torch.from_numpy(value).to(self.decoder.device) for value in inputs.named().values()]
        logits, cache.buffers = self.decoder(*arguments, cache.buffers)
        values: Logits = np.ascontiguousarray(logits.cpu().numpy())
        return values

    def release(self) -> None:
        on_gpu = self.decoder.device.type == "cuda"
        del self.decoder
        if on_gpu:
            torch.cuda.empty_cache()  # what torch keeps for itself, the next backend could not have
