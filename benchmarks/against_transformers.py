r"""Hold the reading of Hugging Face's configurations and of PEFT's LoRA adapters against the libraries that define them.

    .venv/bin/pip install transformers==5.24.0 peft==0.21.2
    .venv/bin/python benchmarks/against_transformers.py --json benchmarks/results/against_transformers.json

Every combination of a list of RoPE settings is read by both: the frequencies are the same, or the configuration is refused
here. Then a random Llama with a LoRA adapter on every linear layer gives both libraries' logits. Exits with 1 where any differ.
"""

import itertools
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click
import peft
import torch
import transformers
from rich.console import Console

import motrt
from motrt.benchmarks.document import leave, machine
from motrt.errors import ConfigError
from motrt.model_def.checkpoint.assemble import convert_llama
from motrt.model_def.checkpoint.llama import read_hf_config
from motrt.model_def.checkpoint.rope import RopeChoices
from motrt.model_def.config import rope_frequencies

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_AT_64: dict[str, Any] = {**LLAMA3, "original_max_position_embeddings": 64}
PLACES: tuple[dict[str, Any] | None, ...] = (
    *(None, {}, {"rope_type": "default"}, {"rope_theta": 2e4}, {"factor": 2.0}, {"type": "linear", "factor": 2.0}),
    *({"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}),
    *(LLAMA3_AT_64, {**LLAMA3_AT_64, "rope_theta": 5e4}, {**LLAMA3_AT_64, "type": "llama3"}, {**LLAMA3_AT_64, "factor": 4.0}),
    {"full_attention": LLAMA3_AT_64},
)
CHOICES: dict[str, tuple[Any, ...]] = {
    "rope_theta": (None, 1e4, 5e5),
    "rope_parameters": PLACES,
    "rope_scaling": PLACES,
    "partial_rotary_factor": (None, 0.5, 1.0),
}
LARGEST_ERROR = 1e-5  # relative L2 of float32 logits; two implementations differ by their order of sums


def compare_rope(folder: Path) -> Counter[str]:
    """Return how many configurations were read alike, refused here, and read differently."""
    outcomes: Counter[str] = Counter()
    for values in itertools.product(*CHOICES.values()):
        settings = {name: value for name, value in zip(CHOICES, values, strict=True) if value is not None}
        file = folder / "config.json"
        file.write_text(json.dumps({"model_type": "llama", **SIZES, **settings}))
        try:
            ours = rope_frequencies(read_hf_config(file, RopeChoices()).rope.config, head_size=16)
        except ConfigError:
            outcomes["refused"] += 1
            continue
        config = transformers.LlamaConfig.from_dict(json.loads(file.read_text()))
        theirs = transformers.LlamaForCausalLM(config).model.rotary_emb.inv_freq.double()
        same = torch.allclose(torch.tensor(ours, dtype=torch.float64), theirs, rtol=1e-5)
        outcomes["same" if same else "different"] += 1
        if not same:
            print(f"differs: {settings}", file=sys.stderr)
    return outcomes


def compare_lora(folder: Path) -> dict[str, float]:
    """Return the relative L2 of the last position's logits, of the base and with the adapter merged."""
    torch.manual_seed(0)
    rope = {**LLAMA3_AT_64, "rope_theta": 5e5}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=rope))
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) / weight.shape[-1] ** 0.5 if weight.ndim > 1 else torch.rand_like(weight) + 0.5
    model.save_pretrained(folder / "llama")
    ids = torch.arange(3, 83)[None]
    errors = {"base": relative_error(folder, None, model, ids)}
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", use_rslora=True)
    adapted = peft.get_peft_model(model, settings)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn_like(weight) * 0.1
    adapted.save_pretrained(folder / "lora")
    return errors | {"with LoRA": relative_error(folder, folder / "lora", adapted, ids)}


def relative_error(folder: Path, lora: Path | None, theirs: torch.nn.Module, ids: torch.Tensor) -> float:
    out = folder / f"native{'' if lora is None else ' with LoRA'}"
    convert_llama(folder / "llama", lora=lora).write(out)
    with motrt.load(out, backend="torch") as session:
        ours = torch.from_numpy(session.prefill([ids[0].tolist()], next_modality=["text"])[0][0])
    with torch.no_grad():
        expected = theirs(ids).logits[0, -1]
    return float((ours - expected).norm() / expected.norm())


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the document here too.")
def main(json_file: Path | None) -> None:
    with tempfile.TemporaryDirectory() as made:
        rope, lora = compare_rope(Path(made)), compare_lora(Path(made))
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    Console(stderr=True).print(f"RoPE settings: {dict(rope)}; relative L2 of logits: {lora}")
    leave({"machine": machine(), "versions": versions, "rope_settings": dict(rope), "relative_l2": lora}, json_file)
    sys.exit(int(rope["different"] > 0 or max(lora.values()) > LARGEST_ERROR))


if __name__ == "__main__":
    main()
