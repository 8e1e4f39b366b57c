"""Random possible configurations, for property tests. Knows the configuration alone."""

from hypothesis import strategies as st

from motrt.model_def.config import (
    MAX_LAYERS,
    RESERVED_MODALITY_NAMES,
    AdapterExpert,
    HeadKind,
    Modality,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    SwigluExpert,
)

HEADS: tuple[HeadKind, ...] = ("split", "shared")

sizes = st.integers(1, 10**6)
positive = st.floats(1e-9, 1e9) | st.integers(1, 10**9)
words = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True).filter(lambda word: word not in RESERVED_MODALITY_NAMES)
experts = st.builds(SwigluExpert, sizes, st.booleans()) | st.builds(AdapterExpert, sizes, sizes, st.booleans())
modalities = st.builds(Modality, words, sizes, experts, st.integers(1, 9), st.none() | positive)
scalings = st.builds(
    RopeScaling,
    factor=positive,
    low_freq_factor=st.floats(0.1, 1),
    high_freq_factor=st.floats(1.5, 9),
    original_max_seq_len=sizes,
)
ropes = st.builds(RopeConfig, positive, st.sampled_from(["interleaved", "half"]), st.none() | scalings)


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    """A configuration of any size and any features: only to be counted and written, most are too big to be made."""
    num_kv_heads = draw(st.integers(1, 64))
    head: HeadKind = draw(st.sampled_from(HEADS))
    return ModelConfig(
        model_width=draw(sizes),
        num_layers=draw(st.integers(1, MAX_LAYERS)),
        num_heads=num_kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=num_kv_heads,
        head_size=2 * draw(sizes),
        modalities=tuple(draw(st.lists(modalities, min_size=1, max_size=4, unique_by=lambda modality: modality.name))),
        max_seq_len=draw(sizes),
        head=head,
        routed_attention=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied_embeddings=head == "shared" and draw(st.booleans()),
        norm_eps=draw(positive),
        rope=draw(ropes),
    )
