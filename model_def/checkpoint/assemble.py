"""Foreign checkpoints become one native model: which sources are laid over which, and what stands in for what none has.

``convert_mot`` reads one training state. ``convert_llama`` builds the routed model from parts: the adapter file prevails, then
MusicGen's feed-forward, then the Llama base, into which a LoRA adapter may have been merged; ``convert_gguf`` has its base from
a GGUF file.
What is left over is decided here, and always reported:

- audio attention that no adapter brings is a *copy* of the text attention;
- biases that MusicGen does not have are zero; projections that nothing brings are random (well scaled, seeded);
- embedding and head rows of audio that nothing brings are zero. The export then refuses the model, naming the rows;
- a head tied to the embedding stays tied in a model of text alone; with audio it is untied, its rows copies of the embedding's.

Nothing is read until it is asked for, one tensor at a time. The formats' names stand in the files beside this one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from motrt.errors import ConfigError
from motrt.model_def.checkpoint import adapter as adapter_file
from motrt.model_def.checkpoint import mot, musicgen
from motrt.model_def.checkpoint.accounting import Accounting, KeyRow
from motrt.model_def.checkpoint.adapter import Adapter, open_adapter
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.checkpoint.gguf_llama import open_gguf
from motrt.model_def.checkpoint.llama import LlamaBase, open_base, tokenizer_beside, tokenizer_notes
from motrt.model_def.checkpoint.lora import merge_lora
from motrt.model_def.checkpoint.musicgen import MusicGen, open_musicgen
from motrt.model_def.checkpoint.name_table import AUDIO, COMPUTED, TEXT
from motrt.model_def.checkpoint.native import SHARD_BYTES, Progress, open_checkpoint, write_checkpoint
from motrt.model_def.checkpoint.params_json import read_params
from motrt.model_def.checkpoint.placement import Placement, Target
from motrt.model_def.checkpoint.raw_state import RawState
from motrt.model_def.checkpoint.rope import RopeChoices
from motrt.model_def.checkpoint.sizes import Shapes, expert_of
from motrt.model_def.config import (
    ENCODEC_CODES,
    AdapterExpert,
    Expert,
    HeadKind,
    Modality,
    ModelConfig,
    SwigluExpert,
    rope_frequencies,
)
from motrt.model_def.head_surgery import Read, with_head
from motrt.model_def.initialize import random_tensor
from motrt.model_def.parameters import EMBEDDING, SHARED_HEAD, parameters, split_head


@dataclass(frozen=True)
class Assembly:
    """A model put together from files, not yet read.

    Attributes:
        config: what it is.
        dtype: the narrowest that holds every source's values exactly, unless another was asked for.
        accounting: what became of every key. Check it before reading: weights that are missing can not be read.
        tokenizer: a ``tokenizer.json`` to travel along, or None.
        read: a native name -> its value, in its source's dtype.
        texts: files to lay beside the weights, by name: a tokenizer that the source holds in another form.
    """

    config: ModelConfig
    dtype: str
    accounting: Accounting
    tokenizer: Path | None
    read: Read
    texts: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (name, value) in the order of the forward pass, read as it is asked for."""
        for parameter in parameters(self.config):
            yield parameter.name, self.read(parameter.name)

    def write(
        self, out: str | Path, dtype: str | None = None, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write the native checkpoint.

        Args:
            out: the folder to make.
            dtype: stored dtype; the assembly's own where None.
            progress: told the bytes of each weight when it is written.
            shard_bytes: weights that take more bytes than this are written in several files.

        Raises:
            CheckpointError: when the accounting is not clean, and as ``write_checkpoint``.
        """
        self.accounting.raise_unless_clean()
        stored = dtype or self.dtype
        write_checkpoint(out, self.config, self.tensors(), stored, self.tokenizer, shard_bytes, progress, self.texts)


def convert_mot(
    state: str | Path, params: str | Path, head: HeadKind | None = None, rope: RopeChoices | None = None
) -> Assembly:
    """A Mixture-of-Transformers training state as a native model.

    Args:
        state: the ``.pt``, ``.pth`` or ``.safetensors`` file, or the folder of a distributed checkpoint.
        params: its ``params.json``, whose ``vocab_size`` is the text vocabulary.
        head: the head to give the result; the state's own where None.
        rope: what the person who converts says of RoPE.

    Raises:
        CheckpointError: when a file is missing, damaged, foreign, or would run code.
        ConfigError: when ``params`` contradicts the weights or ``rope``.
    """
    sizes = read_params(Path(params), rope or RopeChoices(), "mot")
    raw = mot.open_state(Path(state))
    config = mot.config_of(sizes, raw)
    placement = Placement({parameter.name: parameter.shape for parameter in parameters(config)})
    for key in raw.tensors:
        _put_or_note(placement, raw, key, mot.TABLE.native(key), mot.TABLE.reason_to_ignore(key), config)
    placement.note_others(raw)
    placement.finish(lambda name: (raw.source, mot.TABLE.foreign(name)))
    beside = Path(params).parent
    notes = (*sizes.rope.described(), *raw.notes, *tokenizer_notes(beside))
    new_config, read = with_head(config, lambda name: placement.origins[name].read(), head or config.head)
    return Assembly(new_config, placement.dtype(), Accounting(tuple(placement.rows), notes), tokenizer_beside(beside), read)


def convert_llama(
    llama: str | Path,
    musicgen: str | Path | None = None,
    adapter: str | Path | None = None,
    head: HeadKind | None = None,
    seed: int = 0,
    rope: RopeChoices | None = None,
    lora: str | Path | None = None,
) -> Assembly:
    """A native model from a Llama folder, alone or with an audio expert.

    Args:
        llama: Meta's folder or Hugging Face's.
        musicgen: a Hugging Face MusicGen folder; gives the audio expert.
        adapter: an adapter file; prevails over both, and may give the audio expert alone.
        head: the head to give the result; ``split`` with audio, ``shared`` for text alone, where None.
        seed: of the projections that nothing brings.
        rope: what the person who converts says of RoPE.
        lora: a PEFT folder of a LoRA adapter, merged into the Llama.

    Raises:
        CheckpointError: when a file is missing, damaged, foreign, or would run code.
        ConfigError: when a configuration contradicts the weights or ``rope``.
    """
    base = open_base(Path(llama), rope)
    if lora is not None:
        base = merge_lora(base, Path(lora))
    music = open_musicgen(Path(musicgen)) if musicgen is not None else None
    extra = open_adapter(Path(adapter)) if adapter is not None else None
    if extra is not None:
        adapter_file.refuse_other_rotation(extra, base.sizes.rope.config)
    return _Parts(base, music, extra, seed).assembly(head)


def convert_gguf(
    gguf: str | Path,
    musicgen: str | Path | None = None,
    adapter: str | Path | None = None,
    head: HeadKind | None = None,
    seed: int = 0,
    rope: RopeChoices | None = None,
) -> Assembly:
    """A native model from a Llama in a GGUF file, alone or with an audio expert.

    Args:
        gguf: the file.
        musicgen: a Hugging Face MusicGen folder; gives the audio expert.
        adapter: an adapter file; prevails over both, and may give the audio expert alone.
        head: the head to give the result; ``split`` with audio, ``shared`` for text alone, where None.
        seed: of the projections that nothing brings.
        rope: what the person who converts says of RoPE.

    Raises:
        CheckpointError: when a file is missing, damaged, foreign, or would run code.
        ConfigError: when the file's model is no Llama, or contradicts itself or ``rope``.
    """
    found = open_gguf(Path(gguf), rope)
    music = open_musicgen(Path(musicgen)) if musicgen is not None else None
    extra = open_adapter(Path(adapter)) if adapter is not None else None
    assembly = _Parts(found.base, music, extra, seed).assembly(head)
    accounting = replace(assembly.accounting, rows=(*found.rows, *assembly.accounting.rows))
    return replace(assembly, accounting=accounting, texts=found.tokenizer)


def convert_native(path: str | Path, head: HeadKind | None = None, dtype: str | None = None) -> Assembly:
    """A native checkpoint with another head (exactly) or another dtype.

    Raises:
        CheckpointError, ConfigError: as ``open_checkpoint``.
    """
    checkpoint = open_checkpoint(path)
    config, read = with_head(checkpoint.config, checkpoint.read, head or checkpoint.config.head)
    source = checkpoint.path.name
    rows = tuple(
        KeyRow(name, source, "loaded", f"{list(checkpoint.shape(name))} {checkpoint.dtype}") for name in checkpoint.names
    )
    return Assembly(config, dtype or checkpoint.dtype, Accounting(rows), checkpoint.tokenizer_path, read)


class _Parts:
    """The parts of one routed model while they are put together.

    Tables are handled in pieces, one per modality: the base has the text rows, an adapter may have all or the audio rows.
    """

    def __init__(self, base: LlamaBase, music: MusicGen | None, extra: Adapter | None, seed: int) -> None:
        self.base, self.music, self.extra, self.seed = base, music, extra, seed
        self.config = self._config()
        self.placement = Placement(_piece_shapes(self.config))
        self.notes = [*base.sizes.rope.described(), *base.raw.notes, *base.notes]

    def assembly(self, head: HeadKind | None) -> Assembly:
        """Lay the sources over each other, fill what none has, and say so."""
        if self.extra is not None:
            self._lay_adapter(self.extra)
        if self.music is not None:
            self._lay_musicgen(self.music)
        self._lay_base()
        self._copy_audio_attention()
        self._fill_audio_expert()
        self._fill_tables()
        self.placement.finish(self._foreign)
        default: HeadKind = "split" if len(self.config.modalities) > 1 else "shared"
        config, read = with_head(self.config, self._read, head or default)
        accounting = Accounting(tuple(self.placement.rows), tuple(self.notes))
        return Assembly(config, self.placement.dtype(), accounting, self.base.tokenizer, read)

    # What the model is.

    def _config(self) -> ModelConfig:
        shapes = self.extra.shapes() if self.extra is not None else {}
        text = Modality(TEXT, self._text_vocab_size(), self._text_expert())
        audio = self._audio_modality(shapes, text.vocab_size)
        is_tied = self.base.sizes.is_tied and audio is None
        return self.base.sizes.config(
            (text,) if audio is None else (text, audio),
            head="shared" if is_tied else "split",
            tied_embeddings=is_tied,
            qk_norm=any(".q_norm." in name or ".k_norm." in name for name in shapes),
        )

    def _text_vocab_size(self) -> int:
        key = self.base.table.foreign(EMBEDDING) or EMBEDDING
        rows = self.base.raw.tensors[key].shape[0] if key in self.base.raw.tensors else None
        stated = self.base.sizes.vocab_size
        if rows is not None and stated is not None and rows != stated:
            raise ConfigError(
                f"{self.base.sizes.file} contradicts the weights: vocab_size says {stated}, {key} has {rows} rows"
            )
        found = rows or stated
        if found is None:
            raise ConfigError(
                f"{self.base.raw.source} holds no {key}, and {self.base.sizes.file} no vocab_size: is it a Llama?"
            )
        return found

    def _text_expert(self) -> Expert:
        named = {self.base.table.native(key) or key: tensor.shape for key, tensor in self.base.raw.tensors.items()}
        found = expert_of(named, TEXT)
        if found is not None:
            return found
        if self.base.sizes.hidden_size is None:
            raise ConfigError(f"{self.base.raw.source} holds no feed-forward weights: is it a Llama?")
        return SwigluExpert(self.base.sizes.hidden_size)

    def _audio_modality(self, extra: Shapes, text_rows: int) -> Modality | None:
        shapes = dict(extra)
        if self.music is not None:
            for key, tensor in self.music.raw.tensors.items():
                shapes.setdefault(musicgen.TABLE.native(key) or key, tensor.shape)
        expert = expert_of(shapes, AUDIO)
        if expert is None:
            return None
        if isinstance(expert, AdapterExpert):
            expert = AdapterExpert(expert.width, expert.hidden_size, bias=True)  # zero where the source has none
        rows = _audio_rows(extra, text_rows) or (self.music.vocab_size if self.music else None) or ENCODEC_CODES
        plain = mot.audio_modality(rows, expert)
        if self.music is None:
            return plain
        return Modality(AUDIO, rows, expert, self.music.codes_per_frame, self.music.frames_per_second)

    # What each source gives.

    def _lay_adapter(self, extra: Adapter) -> None:
        is_scaled = self.config.rope.scaling is not None
        self.notes += [extra.note, *extra.raw.notes, adapter_file.rope_note(is_scaled)]
        for key in extra.raw.tensors:
            self._put(extra.raw, key, adapter_file.native_name(key), mot.TABLE.reason_to_ignore(key))
        self.placement.note_others(extra.raw)

    def _lay_musicgen(self, music: MusicGen) -> None:
        used, has = self.config.num_layers, music.num_layers()
        self.notes += music.raw.notes
        self.notes.append(f"audio feed-forward: the first {min(used, has)} of MusicGen's {has} layers")
        beyond = f"only the first {used} of {has} layers are used"
        for key in music.raw.tensors:
            name = musicgen.TABLE.native(key)
            if name is not None and int(name.split(".")[1]) >= used:
                self.placement.note(music.raw, key, "ignored", beyond)
            else:
                self._put(music.raw, key, name, musicgen.NOT_NEEDED)
        self.placement.note_others(music.raw)

    def _lay_base(self) -> None:
        raw, table = self.base.raw, self.base.table
        for key in raw.tensors:
            name = table.native(key)
            if name == SHARED_HEAD and self.base.sizes.is_tied:
                self._note_tied_head(key)
            else:
                self._put(raw, key, name, table.reason_to_ignore(key))
        self.placement.note_others(raw)

    def _note_tied_head(self, key: str) -> None:
        """Say of a stored head that the configuration ties to the embedding whether it is the embedding."""
        raw, embedding = self.base.raw, self.base.table.foreign(EMBEDDING) or EMBEDDING
        is_same = (
            embedding in raw.tensors
            and raw.tensors[key].shape == raw.tensors[embedding].shape
            and torch.equal(raw.read(key), raw.read(embedding))
        )
        if is_same:
            self.placement.note(raw, key, "ignored", "the configuration ties the head to the embedding, which it equals")
        else:
            why = "the configuration ties the head to the embedding, from which this one differs: set tie_word_embeddings to "
            self.placement.note(raw, key, "unexpected", f"{why}false if the stored head is meant, or remove it")

    def _put(self, raw: RawState, key: str, name: str | None, reason: str | None) -> None:
        if name not in (EMBEDDING, SHARED_HEAD):
            _put_or_note(self.placement, raw, key, name, reason, self.config)
            return
        sizes = [modality.vocab_size for modality in self.config.modalities]
        expected = " or ".join(f"[{rows}, {self.config.model_width}]" for rows in dict.fromkeys([sum(sizes), *sizes]))
        targets = _piece_targets(self.config, name, raw.tensors[key].shape)
        self.placement.put(raw, key, targets, expected)

    # What none gives.

    def _copy_audio_attention(self) -> None:
        names = [name for name in self._without_origin() if ".attention." in name and f".{AUDIO}." in name]
        copied = [name for name in names if name.replace(f".{AUDIO}.", f".{TEXT}.") in self.placement.origins]
        for name in copied:
            original = name.replace(f".{AUDIO}.", f".{TEXT}.")
            self.placement.copy(name, original, f"of {original}: audio attention begins as the text model's")
        if copied:
            self.notes.append(f"audio attention: {len(copied)} weights are copies of the text model's")

    def _fill_audio_expert(self) -> None:
        # All or none: where a file brings some, it is incomplete, and values made up in between would hide it.
        names = [name for name in self._without_origin() if f".feed_forward.{AUDIO}." in name]
        biases = [name for name in names if name.endswith((".fc1.bias", ".fc2.bias"))]
        if len(biases) == 2 * self.config.num_layers:
            for name in biases:
                zeros = partial(torch.zeros, self.placement.shapes[name])
                self.placement.initialise(name, zeros, "zero: the source's linears have no bias")
            self.notes.append("audio feed-forward: the source's fc1 and fc2 have no bias, so the biases are zero")
        projections = [name for name in names if name.endswith((".down_proj.weight", ".up_proj.weight"))]
        if len(projections) == 2 * self.config.num_layers:
            table = {parameter.name: parameter for parameter in parameters(self.config)}
            for name in projections:
                make = partial(random_tensor, self.config, table[name], self.seed)
                self.placement.initialise(name, make, f"random, seed {self.seed}: no adapter file brings it")
            self.notes.append("down_proj and up_proj are random: train them, or convert with --adapter")

    def _fill_tables(self) -> None:
        ids = dict(zip(self.config.modality_names, self.config.id_ranges, strict=True))
        is_untied = self.base.sizes.is_tied and not self.config.tied_embeddings
        self._zero_rows(_embedding_piece(AUDIO), EMBEDDING, ids)
        for modality in self.config.modality_names if is_untied else ():
            piece, original = split_head(modality), _embedding_piece(modality)
            if piece in self._without_origin() and original in self.placement.origins:
                self.placement.copy(piece, original, f"of the {modality} rows of {EMBEDDING}: the head was tied to them")
        if is_untied:
            self.notes.append("the base's head is tied to its embedding; with audio rows it has weights of its own")
        self._zero_rows(split_head(AUDIO), "the head", ids)

    def _zero_rows(self, piece: str, table: str, ids: dict[str, range]) -> None:
        if piece not in self._without_origin():
            return
        rows = f"rows {ids[AUDIO].start} to {ids[AUDIO].stop - 1} of {table}"
        self.placement.initialise(piece, partial(torch.zeros, self.placement.shapes[piece]), f"zero: {rows}")
        self.notes.append(f"{rows} are zero (audio, untrained): the export refuses them until an adapter file brings them")

    def _without_origin(self) -> list[str]:
        return self.placement.without_origin()

    def _foreign(self, name: str) -> tuple[str, str | None]:
        """The source that a missing weight should have come from, and the key that it should have had there."""
        if name.startswith("layers.") and f".feed_forward.{AUDIO}." in name:
            key = musicgen.TABLE.foreign(name) if self.music is not None else None
            if self.music is not None and key is not None:
                return self.music.raw.source, key
            source = self.extra.raw.source if self.extra is not None else self.base.raw.source
            return source, mot.TABLE.foreign(name)
        whole = {_embedding_piece(TEXT): EMBEDDING, split_head(TEXT): SHARED_HEAD}.get(name, name)
        return self.base.raw.source, self.base.table.foreign(whole)

    def _read(self, name: str) -> torch.Tensor:
        origins = self.placement.origins
        if name != EMBEDDING:
            return origins[name].read()
        dtype = TORCH_DTYPES[self.placement.dtype()]
        pieces = [origins[_embedding_piece(modality)].read() for modality in self.config.modality_names]
        return pieces[0] if len(pieces) == 1 else torch.cat([piece.to(dtype) for piece in pieces])


def _put_or_note(
    placement: Placement, raw: RawState, key: str, name: str | None, reason: str | None, config: ModelConfig
) -> None:
    """Let ``key`` give the weight ``name``, or note why it gives none; a value that contradicts the reason is a fault."""
    if name is not None or reason is None:
        placement.put(raw, key, [Target(name or key)])
        return
    fault = _contradiction(raw, key, reason, config)
    placement.note(raw, key, "unexpected" if fault else "ignored", fault or reason)


def _contradiction(raw: RawState, key: str, reason: str, config: ModelConfig) -> str | None:
    """Why a key that is not needed cannot be left out; None where it can."""
    tensor = raw.tensors[key]
    if reason == mot.UNIT_NORM and not (
        tensor.is_float and tensor.shape == (config.model_width,) and bool((raw.read(key) == 1).all())
    ):
        return (
            "a norm behind the experts with values other than one: this decoder has none there, so the model would be another. "
            "Only states whose norms behind the experts are all one, as they are initialised, are read"
        )
    if reason == COMPUTED and key.endswith((".inv_freq", "rope.freqs")):
        return _other_frequencies(raw.read(key), config) if tensor.is_float else f"stored RoPE frequencies of {tensor.dtype}"
    return None


def _other_frequencies(stored: torch.Tensor, config: ModelConfig) -> str | None:
    """What stored RoPE frequencies [d/2] tell of the configuration's base; None where they agree."""
    for rope in (config.rope, replace(config.rope, scaling=None)):  # some files store them before they are scaled
        expected = torch.tensor(rope_frequencies(rope, config.head_size), dtype=torch.float64)
        if stored.shape == expected.shape and torch.allclose(stored.double(), expected, rtol=0.01, atol=1e-7):
            return None
    return (
        f"stored RoPE frequencies, which a base of {config.rope.theta:g} does not give: the configuration is another model's, "
        "or its base is wrong"
    )


def _embedding_piece(modality: str) -> str:
    """The embedding's rows of one modality, while the model is assembled; no native checkpoint has this name."""
    return f"tok_embeddings.{modality}.weight"


def _piece_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight's dims, the embedding cut into one piece per modality."""
    pieces = {_embedding_piece(one.name): (one.vocab_size, config.model_width) for one in config.modalities}
    return pieces | {parameter.name: parameter.shape for parameter in parameters(config) if parameter.name != EMBEDDING}


def _piece_targets(config: ModelConfig, table: str, shape: tuple[int, ...]) -> list[Target]:
    """The pieces that a table of ``shape`` gives: all of them, the audio rows, or the text rows."""
    piece = _embedding_piece if table == EMBEDDING else split_head
    rows = shape[0] if shape else 0
    if len(config.modalities) > 1 and rows == config.vocab_size:
        return [Target(piece(name), ids) for name, ids in zip(config.modality_names, config.id_ranges, strict=True)]
    if len(config.modalities) > 1 and rows == config.modalities[1].vocab_size:
        return [Target(piece(AUDIO))]
    return [Target(piece(TEXT))]


def _audio_rows(shapes: Shapes, text_rows: int) -> int | None:
    """How many audio ids an adapter's tables speak of; None where they speak of none."""
    if shapes.get(split_head(AUDIO)):
        return shapes[split_head(AUDIO)][0]
    for table in (EMBEDDING, SHARED_HEAD):
        rows = shapes[table][0] if shapes.get(table) else text_rows
        if rows != text_rows:
            return rows - text_rows if rows > text_rows else rows
    return None
