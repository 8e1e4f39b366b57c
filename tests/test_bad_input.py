"""Whatever a person hands to the command line: a sentence with the remedy, no traceback, and nothing half-written.

Each test says what is wrong, runs the command, and looks at the exit code, standard error, and the folder before and after.
"""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from motrt.cli import main
from motrt.errors import MotrtError
from motrt.export import bundle_from_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.runtime.bundle import MANIFEST_FILE, is_bundle
from motrt.tests.model_def import foreign

TINY = ModelConfig.tiny()


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with what would betray a change."""
    return {str(one.relative_to(folder)): (one.lstat().st_mtime_ns, one.lstat().st_size) for one in sorted(folder.rglob("*"))}


class Bench:
    """A folder of one's own to run commands in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def refuses(self, *arguments: object, said: str, code: int = 1) -> str:
        """Run a command that must fail with a sentence, and leave the folder as it was; with ``--json`` just the same."""
        before = everything(self.folder)
        for options in ((), ("--json",)):
            result = CliRunner().invoke(main, [*map(str, arguments), *options])
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            assert result.exit_code == code, result.output
            assert said in result.stderr, result.stderr
            assert "Traceback" not in result.output
            if options:
                told = json.loads(result.stdout)
                assert said in told["message"]
                assert told["error"]
            else:
                sentence = result.stderr
        assert everything(self.folder) == before
        return sentence


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def checkpoint(bench: Bench, tiny_checkpoint: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, bench.folder / "model"))


@pytest.fixture
def bundle(bench: Bench, tiny_bundle: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, bench.folder / "bundle"))


@pytest.fixture(scope="module")
def native(tiny_checkpoint: Path) -> foreign.State:
    return load_file(tiny_checkpoint / "model.safetensors")


def change(checkpoint: Path, edit: Callable[[foreign.State], Any]) -> None:
    state = load_file(checkpoint / "model.safetensors")
    edit(state)
    save_file(state, checkpoint / "model.safetensors")


def reconfigure(checkpoint: Path, **changes: Any) -> None:
    values = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(values | changes), encoding="utf-8")


# Checkpoints


def test_a_checkpoint_that_is_not_there(bench: Bench) -> None:
    gone, out = bench.folder / "gone", bench.folder / "out"
    for arguments in (("export", gone, out), ("convert", out, "--native", gone), ("convert", out, "--llama", gone)):
        bench.refuses(*arguments, said=str(gone))
    bench.refuses("convert", out, "--mot", gone, "--params", gone, said=str(gone))
    bench.refuses("inspect", gone, said=f"nothing lies at {gone}", code=2)


def test_a_checkpoint_in_another_format_is_sent_to_convert(bench: Bench, native: foreign.State) -> None:
    llama = foreign.write_llama_meta(bench.folder / "llama", TINY, native)
    bench.refuses("export", llama, bench.folder / "out", said="other formats become one with `motrt convert`")


@pytest.mark.parametrize("left", [0, 1, 7, 100, 5000, -1])
def test_a_truncated_checkpoint(left: int, bench: Bench, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, left if left >= 0 else weights.stat().st_size - 1)
    for arguments in (("export", checkpoint, bench.folder / "out"), ("inspect", checkpoint)):
        bench.refuses(*arguments, said="model.safetensors")


@pytest.mark.parametrize("left", [0, 1, 100, 5000, -1])
def test_a_truncated_training_state(left: int, bench: Bench, native: foreign.State) -> None:
    state, params = foreign.write_mot(bench.folder, TINY, native)
    os.truncate(state, left if left >= 0 else state.stat().st_size - 1)
    bench.refuses("convert", bench.folder / "out", "--mot", state, "--params", params, said="state.pt")


def test_every_missing_unexpected_and_misshapen_key_is_named(bench: Bench, checkpoint: Path) -> None:
    def spoil(state: foreign.State) -> None:
        del state["norm.weight"], state["layers.1.ffn_norm.weight"]
        state["layers.9.extra.weight"] = torch.zeros(1)
        state["output.audio.weight"] = torch.zeros(32, 63)

    change(checkpoint, spoil)
    said = bench.refuses("export", checkpoint, bench.folder / "out", said="norm.weight")
    for name in ("layers.1.ffn_norm.weight", "layers.9.extra.weight", "output.audio.weight", "[32, 63]", "[32, 64]"):
        assert name in said


def test_every_key_of_a_training_state_that_does_not_fit_is_named(bench: Bench, native: foreign.State) -> None:
    state, params = foreign.write_mot(bench.folder, TINY, native)
    held = torch.load(state, weights_only=True)
    del held["model_state_dict"]["norm.weight"]
    held["model_state_dict"]["surprise.weight"] = torch.zeros(3)
    held["model_state_dict"]["layers.0.ffn_norm.weight"] = torch.zeros(7)
    torch.save(held, state)
    said = bench.refuses("convert", bench.folder / "out", "--mot", state, "--params", params, said="norm.weight")
    assert "surprise.weight" in said
    assert "layers.0.ffn_norm.weight" in said


class Bomb:
    """What an attacker would put into a pickle."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.proof),))


@pytest.mark.parametrize("is_zipped", [True, False])
def test_code_pickled_into_a_pt_file_is_not_run(is_zipped: bool, bench: Bench, native: foreign.State) -> None:
    state, params = foreign.write_mot(bench.folder, TINY, native)
    proof = bench.folder / "the code was run"
    if is_zipped:
        torch.save({"model_state_dict": Bomb(proof)}, state)
    else:
        state.write_bytes(pickle.dumps({"model_state_dict": Bomb(proof)}))
    bench.refuses("convert", bench.folder / "out", "--mot", state, "--params", params, said="state.pt")
    bench.refuses("inspect", state, said="holds pickled code" if is_zipped else "not a PyTorch file of the zip format")
    assert not proof.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, bench: Bench, checkpoint: Path) -> None:
    change(checkpoint, lambda state: state["layers.1.attention.wq.audio.weight"][3].fill_(value))
    for more in ((), ("--allow-untrained",), ("--no-verify",)):
        said = bench.refuses("export", checkpoint, bench.folder / "out", *more, said="layers.1.attention.wq.audio.weight")
    assert "NaN" in said or "Inf" in said
    shown = CliRunner().invoke(main, ["inspect", str(checkpoint)])
    assert shown.exit_code == 0
    assert "layers.1.attention.wq.audio.weight" in shown.stdout


@pytest.mark.parametrize("where", ["tok_embeddings.weight", "output.audio.weight"])
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_audio_rows_that_were_never_trained_are_named_with_the_remedy(
    where: str, value: float, bench: Bench, checkpoint: Path
) -> None:
    change(checkpoint, lambda state: state[where][-32:].fill_(value))
    said = bench.refuses("export", checkpoint, bench.folder / "out", said="96 to 127")
    assert "--allow-untrained" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 3}, "layers.2."),
        ({"num_layers": 1}, "layers.1."),
        ({"model_width": 32}, "tok_embeddings.weight"),
        ({"head": "shared"}, "output.weight"),
        ({"qk_norm": True}, "q_norm"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": "two"}, "num_layers"),
        ({"num_heads": 5}, "num_heads"),
        ({"modalities": []}, "modalities"),
        ({"telepathy": 1}, "telepathy"),
    ],
)
def test_a_configuration_that_contradicts_the_weights_or_itself(
    changes: dict[str, Any], said: str, bench: Bench, checkpoint: Path
) -> None:
    reconfigure(checkpoint, **changes)
    bench.refuses("export", checkpoint, bench.folder / "out", said=said)


# Outputs

MAKERS = ("init", "convert", "export")


def making(command: str, checkpoint: Path, out: object) -> tuple[object, ...]:
    return {
        "init": ("init", out, "--preset", "tiny"),
        "convert": ("convert", out, "--native", checkpoint),
        "export": ("export", checkpoint, out, "--no-verify"),
    }[command]


@pytest.mark.parametrize("command", MAKERS)
@pytest.mark.parametrize("kind", ["folder", "file", "link", "itself"])
def test_an_output_that_exists_is_never_touched(command: str, kind: str, bench: Bench, checkpoint: Path) -> None:
    out = bench.folder / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("precious")
    elif kind == "link":
        out.symlink_to(bench.folder / "nowhere")
    else:
        out = checkpoint
    bench.refuses(*making(command, checkpoint, out), said="exists already and nothing is overwritten: remove it, or choose")


@pytest.mark.parametrize("command", MAKERS)
def test_an_output_whose_parent_is_missing_or_a_file(command: str, bench: Bench, checkpoint: Path) -> None:
    (bench.folder / "file").write_text("")
    bench.refuses(*making(command, checkpoint, bench.folder / "no" / "out"), said="does not exist: make it first")
    bench.refuses(*making(command, checkpoint, bench.folder / "file" / "out"), said="is not a folder: make it first")


@pytest.mark.parametrize("command", MAKERS)
def test_an_output_that_can_not_be_written(
    command: str, bench: Bench, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever runs the tests may be allowed everything, so the answer is made up.
    monkeypatch.setattr(os, "access", lambda path, mode, **options: Path(path) != bench.folder)
    bench.refuses(*making(command, checkpoint, bench.folder / "out"), said="can not be written: change its permissions")


@pytest.mark.parametrize("command", MAKERS)
def test_a_disk_that_is_too_small_is_told_before_the_work(
    command: str, bench: Bench, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    said = bench.refuses(*making(command, checkpoint, bench.folder / "out"), said="free some space, or choose a folder on an")
    assert "GB free" in said


def test_a_disk_that_fills_up_on_the_way(bench: Bench, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle_from_checkpoint, "trace", full)
    said = bench.refuses("export", checkpoint, bench.folder / "out", said="is full: free some space")
    assert str(bench.folder) in said


@pytest.mark.parametrize(
    "command", [("inspect",), ("verify",), ("generate", "--prompt-ids", "1"), ("export", "x"), ("convert", "--native")]
)
def test_a_path_that_the_machine_can_not_have(command: tuple[str, ...], bench: Bench) -> None:
    long = "a" * 5000
    arguments = {"export": ("export", long, bench.folder / "x"), "convert": ("convert", bench.folder / "x", "--native", long)}
    bench.refuses(*arguments.get(command[0], (command[0], long, *command[1:])), said="File name too long")


# Prompts and sampling


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt-ids", "128"), "ids must be in 0..127 (128 came, 1 such)"),
        (("--prompt-ids", "1,-1"), "ids must be in 0..127 (-1 came, 1 such)"),
        (("--prompt-ids", "99999999999999999999"), "flat sequence of whole numbers"),
        (("--prompt-ids", ""), "--prompt-ids must be whole numbers"),
        (("--prompt-ids", "1,,2"), "--prompt-ids must be whole numbers"),
        (("--prompt-ids", "1;2"), "--prompt-ids must be whole numbers"),
        (("--prompt-ids", "one"), "--prompt-ids must be whole numbers"),
        (("--prompt-ids", ",".join("1" * 129)), "the 128 positions that this model holds per row: shorten the prompt"),
        (("--prompt-ids", ",".join("1" * 100), "--max-tokens", "29"), "ask for fewer tokens"),
        (("--prompt-ids", ",".join("1" * 100), "--audio-frames", "8"), "ask for fewer tokens"),
        (("--prompt", "hello"), "carries no tokenizer: give the prompt as ids"),
        (("--prompt", ""), "carries no tokenizer"),
        (("--prompt-ids", "1", "--stop-id", "128"), "stop_ids must be whole numbers in 0..127"),
        (("--prompt-ids", "1", "--schedule", "smell:5"), "no modality 'smell': this model has text, audio"),
        (("--prompt-ids", "1", "--schedule", "text:x"), "write runs as 'text:20,audio:50f'"),
        (("--prompt-ids", "1", "--schedule", "text,audio:3"), "what follows it would never come"),
        (("--prompt-ids", "1", "--temperature", "-1"), "temperature must be a number of at least 0"),
        (("--prompt-ids", "1", "--temperature", "nan"), "temperature must be a number of at least 0"),
        (("--prompt-ids", "1", "--temperature", "inf"), "temperature must be a number of at least 0"),
        (("--prompt-ids", "1", "--top-k", "0"), "top_k must be a whole number of at least 1"),
        (("--prompt-ids", "1", "--top-p", "0"), "top_p must be a number above 0 and at most 1"),
        (("--prompt-ids", "1", "--top-p", "1.1"), "top_p must be a number above 0 and at most 1"),
        (("--prompt-ids", "1", "--min-p", "1"), "min_p must be a number of at least 0 and below 1"),
        (("--prompt-ids", "1", "--repetition-penalty", "0"), "repetition_penalty must be a number above 0"),
        (("--prompt-ids", "1", "--seed", "-1"), "seed must be a whole number in 0..2**63-1"),
    ],
)
def test_a_prompt_or_a_value_out_of_range(options: tuple[str, ...], said: str, bench: Bench, bundle: Path) -> None:
    bench.refuses("generate", bundle, *options, said=said, code=2)


def test_every_sampling_value_out_of_range_is_named(bench: Bench, bundle: Path) -> None:
    wrong = ("--temperature", "-1", "--top-k", "0", "--top-p", "2", "--min-p", "-1", "--repetition-penalty", "-1")
    said = bench.refuses("generate", bundle, "--prompt-ids", "1", *wrong, said="temperature", code=2)
    assert all(name in said for name in ("top_k", "top_p", "min_p", "repetition_penalty"))


def test_audio_frames_of_a_model_without_audio(bench: Bench, make_checkpoint: Any) -> None:
    text_only = make_checkpoint(TINY.replace(modalities=TINY.modalities[:1]))
    arguments = ("generate", text_only, "--prompt-ids", "1", "--audio-frames", "2")
    bench.refuses(*arguments, said="--audio-frames needs a model with a modality of several codes per frame", code=2)


# Bundles


def flip(file: Path) -> None:
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 4
    file.write_bytes(held)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "model.onnx.data"])
def test_one_flipped_byte(name: str, bench: Bench, bundle: Path) -> None:
    flip(bundle / name)
    for arguments in (("verify", bundle), ("inspect", bundle), ("generate", bundle, "--prompt-ids", "1", "--check", "hash")):
        bench.refuses(*arguments, said=name)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "model.onnx.data"])
def test_one_byte_less(name: str, bench: Bench, bundle: Path) -> None:
    os.truncate(bundle / name, (bundle / name).stat().st_size - 1)
    for arguments in (("verify", bundle), ("inspect", bundle), ("generate", bundle, "--prompt-ids", "1")):
        bench.refuses(*arguments, said=name)


def test_a_bundle_of_a_newer_format(bench: Bench, bundle: Path) -> None:
    values = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    (bundle / MANIFEST_FILE).write_text(json.dumps(values | {"format_version": 2}), encoding="utf-8")
    for arguments in (("verify", bundle), ("inspect", bundle), ("generate", bundle, "--prompt-ids", "1")):
        bench.refuses(*arguments, said="upgrade motrt")


def test_what_is_no_bundle(bench: Bench, checkpoint: Path) -> None:
    bench.refuses("verify", checkpoint, said="so it is no bundle: make one with `motrt export`")
    bench.refuses("generate", bench.folder, "--prompt-ids", "1", said="so it is no bundle")
    bench.refuses("verify", bench.folder / "gone", said="does not exist")
    bench.refuses("inspect", bench.folder, said="nothing that motrt knows", code=2)


@pytest.mark.parametrize("content", [b"", b"noise", b"\x00" * 100])
def test_what_is_no_onnx_file(content: bytes, bench: Bench) -> None:
    (bench.folder / "x.onnx").write_bytes(content)
    bench.refuses("inspect", bench.folder / "x.onnx", said="is no ONNX file", code=2)


def test_verify_asks_for_a_checkpoint_that_moved_or_changed(bench: Bench, make_checkpoint: Any, bundle: Path) -> None:
    other = make_checkpoint(TINY.replace(norm_eps=1e-4))
    bench.refuses("verify", bundle, "--checkpoint", other, code=2, said="name the right one with --checkpoint, or export again")
    bench.refuses("verify", bundle, "--checkpoint", bench.folder / "gone", code=2, said="gone")


# What is not installed, and what interrupts

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from motrt.cli import main
main(sys.argv[2:], prog_name="motrt")
"""


@pytest.mark.parametrize(
    ("package", "arguments", "said"),
    [
        ("torch", ("init", "OUT"), "pip install 'motrt[export,cpu]'"),
        ("torch", ("convert", "OUT", "--native", "MODEL"), "pip install 'motrt[export,cpu]'"),
        ("torch", ("export", "MODEL", "OUT"), "pip install 'motrt[export,cpu]'"),
        ("torch", ("verify", "BUNDLE"), "pip install 'motrt[export,cpu]'"),
        ("torch", ("inspect", "BUNDLE"), "pip install 'motrt[export,cpu]'"),
        ("torch", ("generate", "BUNDLE", "--prompt-ids", "1", "--backend", "torch"), "pip install 'motrt[export]'"),
        ("onnx", ("export", "MODEL", "OUT"), "pip install 'motrt[export,cpu]'"),
        ("onnxscript", ("export", "MODEL", "OUT", "--no-verify"), "pip install 'motrt[export,cpu]'"),
        ("onnxruntime", ("generate", "BUNDLE", "--prompt-ids", "1"), "pip install 'motrt[cpu]'"),
        ("onnxruntime", ("verify", "BUNDLE"), "pip install 'motrt[cpu]'"),
        ("onnxruntime", ("export", "MODEL", "OUT"), "pip install 'motrt[cpu]'"),
    ],
)
def test_a_package_that_is_not_installed(
    package: str, arguments: tuple[str, ...], said: str, bench: Bench, checkpoint: Path, bundle: Path
) -> None:
    paths = {"OUT": bench.folder / "out", "MODEL": checkpoint, "BUNDLE": bundle}
    before = everything(bench.folder)
    command = [sys.executable, "-c", BLOCKED, package, *(str(paths.get(one, one)) for one in arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert everything(bench.folder) == before


EXPORT_SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
from motrt.export import bundle_from_checkpoint as export
def slow(*arguments, **named):
    print("writing", flush=True)
    time.sleep(600)
export.trace = slow
from motrt.cli import main
main(["export", *sys.argv[1:], "--no-verify"], prog_name="motrt")
"""


def interrupted(checkpoint: Path, out: Path, *signals: signal.Signals) -> "subprocess.CompletedProcess[str]":
    """An export that is in the middle of its work when signals come."""
    command = [sys.executable, "-c", EXPORT_SLOWLY, str(checkpoint), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        for one in signals:
            process.send_signal(one)
        said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *said)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_an_interrupted_export_leaves_nothing(sent: signal.Signals, code: int, bench: Bench, checkpoint: Path) -> None:
    before = everything(bench.folder)
    done = interrupted(checkpoint, bench.folder / "out", sent)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert everything(bench.folder) == before


def test_a_killed_export_leaves_nothing_that_opens_and_the_next_run_cleans_up(
    bench: Bench, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = bench.folder / "out"
    interrupted(checkpoint, out, signal.SIGKILL)
    (partial,) = (one for one in bench.folder.iterdir() if one != checkpoint)
    assert not is_bundle(partial)
    monkeypatch.setattr(
        bundle_from_checkpoint, "trace", lambda *arguments, **named: (_ for _ in ()).throw(MotrtError("far enough"))
    )
    result = CliRunner().invoke(main, ["export", str(checkpoint), str(out)])
    assert "far enough" in result.stderr
    assert set(bench.folder.iterdir()) == {checkpoint}


def test_two_exports_to_one_place_do_not_meet(bench: Bench, checkpoint: Path) -> None:
    out = bench.folder / "out"
    command = [sys.executable, "-c", EXPORT_SLOWLY, str(checkpoint), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "writing\n"
        bench.refuses("export", checkpoint, out, said="another run is writing")
        first.send_signal(signal.SIGINT)
    assert set(bench.folder.iterdir()) == {checkpoint}
