"""The operations whose PyTorch form and ONNX form are written differently, side by side.

Each computes in PyTorch when called, and becomes the one standard operator of opset 24 when the model is traced.
That the two mean the same is what the parity ladder proves.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import Tensor

from motrt.model_def.config import RopeConfig, RopeStyle, rope_frequencies

OPSET = 24

_ONNX_DTYPES = {torch.float32: 1, torch.int64: 7}  # ONNX's TensorProto.DataType; what defines the model needs no onnx


def _traced_operator(
    name: str, inputs: Sequence[Tensor | None], like: Tensor, dtype: torch.dtype | None = None, **attributes: int | float | str
) -> Tensor:
    """One ONNX operator in the traced graph, its output of ``like``'s shape, and of its dtype where no other is given."""
    attrs: dict[str, Any] = dict(attributes)
    return torch.onnx.ops.symbolic(name, inputs, attrs=attrs, dtype=dtype or like.dtype, shape=like.shape, version=OPSET)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in ``dtype``, float32 or int64 (ONNX ``Cast``)."""
    if x.dtype == dtype:
        return x
    if torch.onnx.is_in_onnx_export():
        return _traced_operator("Cast", (x,), x, dtype, to=_ONNX_DTYPES[dtype])
    return x.to(dtype)


def rope_tables(rope: RopeConfig, head_size: int, max_seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position: two tensors [max_seq_len, d/2], computed in float64, rounded once."""
    # On the CPU whatever the default device: a trace has none of the numbers, and they must not mix.
    frequencies = torch.tensor(rope_frequencies(rope, head_size), dtype=torch.float64, device="cpu")
    angles = torch.arange(max_seq_len, dtype=torch.float64, device="cpu")[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, style: RopeStyle) -> Tensor:
    """Rotate queries or keys by their positions (ONNX ``RotaryEmbedding``).

    Shapes: x [b, heads, s, d]; cos, sin [max_seq_len, d/2]; positions [b, s] int64; result like x.
    """
    if torch.onnx.is_in_onnx_export():
        inputs = (x, cos, sin, positions)
        return _traced_operator("RotaryEmbedding", inputs, x, interleaved=int(style == "interleaved"))
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [b, 1, s, d/2]
    if style == "interleaved":
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack((first * c - second * s, second * c + first * s), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


def write_cache(cache: Tensor, new: Tensor, cache_position: Tensor) -> Tensor:
    """The cache with ``new`` written behind what each row holds (ONNX ``TensorScatter``, linear).

    Shapes: cache [b, k, t, d]; new [b, k, s, d]; cache_position [b] int64, with cache_position + s <= t.
    """
    if torch.onnx.is_in_onnx_export():
        return _traced_operator("TensorScatter", (cache, new, cache_position), cache, axis=2, mode="linear")
    rows = torch.arange(new.shape[0], device=new.device)[:, None]
    columns = cache_position[:, None] + torch.arange(new.shape[2], device=new.device)
    written = cache.clone()
    written[rows, :, columns] = new.transpose(1, 2)  # [b, k, s, d] -> [b, s, k, d]
    return written


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Grouped-query attention under an explicit mask (ONNX ``Attention``): softmax(q k / sqrt(d)) v.

    The mask is explicit because implicit ones changed their meaning between runtime versions.
    Shapes: query [b, h, s, d]; key, value [b, k, t, d]; visible [b, 1, s, t] bool; result like query.
    """
    if torch.onnx.is_in_onnx_export():
        return _traced_operator("Attention", (query, key, value, visible), query, scale=query.shape[-1] ** -0.5)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)


def attend_to_first(query: Tensor, key: Tensor, value: Tensor, num_keys: Tensor) -> Tensor:
    """The same for one query per row, which sees the first ``num_keys`` keys of its row.

    One query has nothing behind it to be hidden, so a number says what a mask would, and kernels that take no mask can be
    used (ONNX ``Attention`` with ``nonpad_kv_seqlen``, not causal).
    Shapes: query [b, h, 1, d]; key, value [b, k, t, d]; num_keys [b] int64, at least 1; result like query.
    """
    if torch.onnx.is_in_onnx_export():
        inputs = (query, key, value, None, None, None, num_keys)
        return _traced_operator("Attention", inputs, query, scale=query.shape[-1] ** -0.5)
    keys = torch.arange(key.shape[2], device=key.device)
    return attend(query, key, value, keys < num_keys[:, None, None, None])
