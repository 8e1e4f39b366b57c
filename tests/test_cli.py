"""The command line from end to end: every command, in its two voices (tables and JSON), and its exit codes."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from motrt.cli import main
from motrt.export import verification
from motrt.export.parity.findings import Outcome
from motrt.model_def.config import ModelConfig
from motrt.runtime.bundle import is_bundle, open_bundle
from motrt.tests.model_def import foreign

TINY = ModelConfig.tiny()


def run(*arguments: object) -> Result:
    """A command that is expected to end by itself: what escapes it is raised."""
    result = CliRunner().invoke(main, [str(one) for one in arguments], prog_name="motrt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(*arguments: object, code: int = 0) -> Any:
    """What the command printed: one JSON document and nothing else."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def native(tiny_checkpoint: Path) -> foreign.State:
    return load_file(tiny_checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``model`` that has a tokenizer, and the bundle ``bundle``, verified, all by commands."""
    folder = tmp_path_factory.mktemp("proven")
    assert run("init", folder / "model", "--preset", "tiny", "--seed", "3").exit_code == 0
    words = {word: number for number, word in enumerate(["hello", "world", "?"])}
    Tokenizer(models.WordLevel(words, unk_token="?")).save(str(folder / "model" / "tokenizer.json"))
    told = run_json("export", folder / "model", folder / "bundle")
    assert told["parity"]["verdict"] == "PASS"
    return folder


def test_init_makes_what_it_says(tmp_path: Path) -> None:
    told = run_json("init", tmp_path / "m", "--preset", "tiny", "--head", "shared", "--dtype", "bfloat16", "--seed", "5")
    assert told == {
        "checkpoint": str(tmp_path / "m"),
        "parameters": 131584,
        "bytes": 263168,
        "dtype": "bfloat16",
        "seed": 5,
    }
    found = run_json("inspect", tmp_path / "m")
    assert (found["kind"], found["dtype"], found["config"]["head"]) == ("native checkpoint", "bfloat16", "shared")
    assert found["total_parameters"] == told["parameters"]


def test_the_same_seed_makes_the_same_checkpoint(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("init", tmp_path / name, "--preset", "tiny", "--seed", seed).exit_code == 0
    first, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == same != other


def test_convert_reads_a_training_state(tmp_path: Path, native: foreign.State) -> None:
    state, params = foreign.write_mot(tmp_path, TINY, native)
    told = run_json("convert", tmp_path / "out", "--mot", state, "--params", params)
    assert told["accounting"]["counts"]["loaded"] > 0
    assert told["config"]["head"] == "split"
    table = run("convert", tmp_path / "again", "--mot", state, "--params", params, "--head", "shared")
    assert "ignored" in table.stdout
    assert "look at it with `motrt inspect" in table.stdout
    assert run_json("inspect", tmp_path / "again")["config"]["head"] == "shared"


@pytest.mark.parametrize("is_meta", [True, False], ids=["Meta", "Hugging Face"])
def test_convert_assembles_a_model_from_parts(is_meta: bool, tmp_path: Path, native: foreign.State) -> None:
    write = foreign.write_llama_meta if is_meta else foreign.write_llama_hf
    llama = write(tmp_path / "llama", TINY, native)
    musicgen = foreign.write_musicgen(tmp_path / "musicgen", TINY, native)
    adapter = foreign.write_adapter(
        tmp_path / "adapter.pt", {name: value for name, value in foreign.mot_state(TINY, native).items() if "_proj" in name}
    )
    told = run_json("convert", tmp_path / "out", "--llama", llama, "--musicgen", musicgen, "--adapter", adapter)
    assert set(told["accounting"]["counts"]) >= {"loaded", "ignored"}
    assert [one["name"] for one in told["config"]["modalities"]] == ["text", "audio"]


def test_convert_gives_a_native_checkpoint_another_head_and_dtype(tmp_path: Path, tiny_checkpoint: Path) -> None:
    run_json("convert", tmp_path / "out", "--native", tiny_checkpoint, "--head", "shared", "--dtype", "float16")
    found = run_json("inspect", tmp_path / "out")
    assert (found["dtype"], found["config"]["head"]) == ("float16", "shared")


def test_inspect_tells_each_kind_apart(tmp_path: Path, proven: Path, native: foreign.State) -> None:
    state, _ = foreign.write_mot(tmp_path, TINY, native)
    llama = foreign.write_llama_meta(tmp_path / "llama", TINY, native)
    musicgen = foreign.write_musicgen(tmp_path / "musicgen", TINY, native)
    kinds = {
        proven / "model": "native checkpoint",
        proven / "bundle": "bundle",
        proven / "bundle" / "model.onnx": "ONNX file",
        state: "mot",
        llama: "llama-meta",
        musicgen: "musicgen",
    }
    for path, kind in kinds.items():
        found = run_json("inspect", path)
        assert found["kind"] == kind
        assert found["total_parameters"] > 0
        assert kind in run("inspect", path).stdout


def test_inspect_of_a_bundle_tells_what_it_was_made_of_and_that_it_was_proven(proven: Path) -> None:
    found = run_json("inspect", proven / "bundle")
    assert found["source"]["path"] == str(proven / "model")
    assert found["parity"]["verdict"] == "PASS"
    assert {one["name"] for one in found["files"]} == {"model.onnx", "model.onnx.data", "tokenizer.json"}
    assert found["bytes_read_per_step"]["text"] > found["bytes_read_per_step"]["audio"]


@pytest.mark.parametrize("what", ["model", "bundle", "bundle/model.onnx"])
def test_inspect_fits_a_terminal_and_breaks_no_hash(what: str, proven: Path) -> None:
    command = [sys.executable, "-m", "motrt", "inspect", str(proven / what)]
    code = f"import os, pty, sys; os.environ.update(COLUMNS='80', TERM='dumb'); sys.exit(pty.spawn({command!r}) >> 8)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    lines = shown.stdout.replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 80
    for one in run_json("inspect", proven / what)["files"]:
        assert any(one["sha256"] in line for line in lines)


def test_export_and_verify_say_the_same_of_a_bundle(proven: Path) -> None:
    manifest = open_bundle(proven / "bundle", "hash").manifest
    assert manifest.parity is not None
    told = run_json("verify", proven / "bundle")
    assert told["verdict"] == manifest.parity["verdict"] == "PASS"
    assert [one["question"] for one in told["findings"]] == [one["question"] for one in manifest.parity["findings"]]


@pytest.mark.parametrize(
    ("verdict", "loss", "code"),
    [
        (Outcome.PASS, None, 0),
        (Outcome.FAIL, None, 1),
        (Outcome.AMBIGUOUS, None, 3),
        (Outcome.PASS, "within", 0),
        (Outcome.PASS, "over", 4),
        (Outcome.AMBIGUOUS, "over", 4),
        (Outcome.FAIL, "over", 1),
    ],
)
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_verifys_exit_code_is_its_verdict(
    verdict: Outcome, loss: str | None, code: int, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Judged:
        def to_page(self) -> dict[str, Any]:
            finding: dict[str, Any] = {
                "rung": "P4",
                "graph": "model",
                "question": "agreement",
                "outcome": verdict.value,
                "detail": "so it is",
                "figures": {},
            }
            told = {"verdict": verdict.value, "seconds": 1.0, "backend": "b", "reference": "r", "findings": [finding]}
            return {**told, "loss": loss, "notes": ["onnxruntime is another"]}

    monkeypatch.setattr(verification, "verify_bundle", lambda *arguments: Judged())
    result = run("verify", "anything", *options)
    assert result.exit_code == code
    assert verdict.value in result.stdout


def test_a_format_that_loses_too_much_is_exit_code_4_and_leaves_nothing(proven: Path, tmp_path: Path) -> None:
    said = run("export", proven / "model", tmp_path / "b", "--precision", "int4", "--max-loss", "1e-6")
    assert said.exit_code == 4 and not (tmp_path / "b").exists()
    for words in ("is the model, in a format that loses more of it than --max-loss", "quantized alone loses", "--part"):
        assert words in said.stderr
    assert run("export", proven / "model", tmp_path / "b", "--precision", "int4", "--no-verify").exit_code == 0
    assert run("export", proven / "model", tmp_path / "c", "--max-loss", "1").exit_code == 2
    told = run("verify", tmp_path / "b", "--max-loss", "1e-6")
    assert told.exit_code == 4 and "over its budget" in told.stdout
    assert run("verify", tmp_path / "b", "--max-loss", "5").exit_code in (0, 3)


def test_verify_explains_its_limits_names_the_parts_and_writes_a_report(proven: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("[1, 2, 3]", encoding="utf-8")
    wanted = ("--bisect", "--explain", "--data", tmp_path / "mine.jsonl", "--report", tmp_path / "report")
    said = run("verify", proven / "bundle", *wanted)
    assert said.exit_code == 0
    for word in (
        "unit roundoff of fp32",
        "each row is held against its own figure",
        "every part of the graph is within its budget",
        "report.html",
    ):
        assert word in said.stdout
    told = run_json("verify", proven / "bundle", "--bisect", "--explain")
    assert told["bisect"]["first"] is None
    assert told["explanation"]
    assert "positions" not in told
    assert {"bisect", "explanation"}.isdisjoint(run_json("verify", proven / "bundle"))


def test_sequences_that_can_not_be_used_are_exit_code_2_with_their_lines(proven: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("[1, 2, 3]\n[1]\n", encoding="utf-8")
    said = run("verify", proven / "bundle", "--data", tmp_path / "mine.jsonl")
    assert said.exit_code == 2
    assert "line 2: 1 ids" in said.stderr


def test_an_export_that_is_not_verified_says_so(tiny_bundle: Path) -> None:
    assert "not verified" in run("inspect", tiny_bundle).stdout


@pytest.mark.parametrize("place", ["elsewhere", "a name with spaces ü 漢", "deep/er/b"])
def test_a_bundle_may_be_moved_anywhere_and_verify_still_finds_its_checkpoint(
    place: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / place
    moved.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tiny_bundle, moved)
    monkeypatch.chdir(moved.parent)
    looked_for: list[Path] = []

    def found(path: Path) -> None:
        looked_for.append(Path(path))
        raise KeyError("far enough")

    monkeypatch.setattr(verification, "open_checkpoint", found)
    with pytest.raises(KeyError, match="far enough"):
        run("verify", f"{moved.name}/")
    assert looked_for[0].is_absolute()
    assert (looked_for[0] / "model.safetensors").is_file()


def test_generate_streams_and_then_tells_the_speed_of_each_phase(proven: Path) -> None:
    result = run("generate", proven / "bundle", "--prompt", "hello", "--schedule", "text:3,audio:2f")
    assert result.exit_code == 0
    assert result.stdout.count("[") == 2  # two frames
    for phase in ("prefill, to the first token", "text decode", "audio decode", "tokens/s"):
        assert phase in result.stdout


def test_generate_tells_a_machine_everything(proven: Path) -> None:
    told = run_json(
        "generate", proven / "bundle", "--prompt-ids", "0,1", "--audio-frames", "2", "--temperature", "0.7", "--seed", "1"
    )
    assert len(told["tokens"]) == 8
    assert told["modalities"] == ["audio"] * 8
    assert [one["codes"] for one in told["frames"]] == [[t - 96 for t in told["tokens"][i : i + 4]] for i in (0, 4)]
    assert (told["finish"], told["backend"], told["precision"]) == ("schedule", "onnxruntime (CPU)", "fp32")
    assert told["sampling"]["seed"] == 1
    again = run_json(
        "generate", proven / "bundle", "--prompt-ids", "0,1", "--audio-frames", "2", "--temperature", "0.7", "--seed", "1"
    )
    assert again["tokens"] == told["tokens"]


def test_text_and_its_ids_are_the_same_prompt(proven: Path) -> None:
    by_text = run_json("generate", proven / "bundle", "--prompt", "hello", "--max-tokens", "5", "--check", "hash")
    by_ids = run_json("generate", proven / "bundle", "--prompt-ids", "0", "--max-tokens", "5", "--backend", "torch")
    assert by_text["tokens"] == by_ids["tokens"]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ((), 64),
        (("--schedule", "interleave:text=3,audio=4"), 64),
        (("--max-tokens", "0"), 0),
        (("--max-tokens", "2"), 2),
    ],
)
def test_without_a_limit_a_generation_ends_soon(options: tuple[str, ...], count: int, proven: Path) -> None:
    assert len(run_json("generate", proven / "bundle", "--prompt-ids", "0", *options)["tokens"]) == count
    assert run("generate", proven / "bundle", "--prompt-ids", "0", *options).exit_code == 0


def test_a_stop_id_ends_a_generation(proven: Path) -> None:
    first = run_json("generate", proven / "bundle", "--prompt-ids", "0", "--max-tokens", "9")["tokens"][0]
    told = run_json("generate", proven / "bundle", "--prompt-ids", "0", "--stop-id", first, "--stop-id", "95")
    assert (told["tokens"], told["finish"]) == ([first], "stop")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "b"), "give one of --prompt and --prompt-ids"),
        (("generate", "b", "--prompt", "x", "--prompt-ids", "1"), "give one of --prompt and --prompt-ids"),
        (
            ("generate", "b", "--prompt", "x", "--audio-frames", "1", "--schedule", "text"),
            "give one of --audio-frames and --schedule",
        ),
        (("generate", "b", "--prompt", "x", "--audio-frames", "0"), "--audio-frames"),
        (("generate", "b", "--prompt", "x", "--max-tokens", "-1"), "--max-tokens"),
        (("generate", "b", "--prompt", "x", "--threads", "99999999999"), "--threads"),
        (("convert", "out"), "give one of --mot, --llama, --gguf or --native"),
        (("convert", "out", "--mot", "a", "--params", "p", "--llama", "b"), "give one of --mot, --llama, --gguf or --native"),
        (("convert", "out", "--mot", "a"), "--mot and --params belong together"),
        (("convert", "out", "--llama", "a", "--params", "b"), "--mot and --params belong together"),
        (("convert", "out", "--native", "a", "--musicgen", "b"), "are laid over --llama"),
        (("init", "out", "--preset", "huge"), "'huge' is not one of"),
        (("init", "out", "--seed", "-1"), "--seed"),
        (("export", "a", "b", "--precision", "int3"), "'int3' is not one of"),
        (("export", "a", "b", "--max-seq-len", "0"), "--max-seq-len"),
        (("verify", "b", "--backend", "abacus"), "'abacus' is not one of"),
        (("verify", "b", "--max-loss", "0"), "--max-loss"),
        (("export", "a", "b", "--precision", "int4", "--max-loss", "much"), "--max-loss"),
        (("inspect",), "give a PATH, or --backends"),
        (("fly",), "No such command 'fly'"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_a_sentence(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["init", "convert", "inspect", "export", "verify", "generate"])
def test_every_command_explains_itself(command: str) -> None:
    for option in ("--help", "-h"):
        result = run(command, option)
        assert result.exit_code == 0
        assert "--json" in result.stdout


SAYING: dict[str, tuple[str, ...]] = {
    "help": ("--help",),
    "version": ("--version",),
    "tables": ("inspect", "--backends"),
    "a document": ("inspect", "--backends", "--json"),
    "a stream": ("generate", "{bundle}", "--prompt-ids", "0", "--max-tokens", "100"),
    "a stream as a document": ("generate", "{bundle}", "--prompt-ids", "0", "--max-tokens", "3", "--json"),
    "an error as a document": ("generate", "nowhere", "--prompt-ids", "0", "--json"),
}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("saying", SAYING)
def test_a_full_standard_output_is_a_sentence(saying: str, unbuffered: str, proven: Path) -> None:
    done = redirected(saying, ">/dev/full", proven, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert "Error: No space left on device, on standard output" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("saying", ["version", "a stream", "a document"])
@pytest.mark.parametrize(("where", "said"), [(">&-", "standard output is closed"), ("1</dev/null", "Bad file descriptor")])
def test_a_closed_standard_output_is_a_sentence(saying: str, where: str, said: str, proven: Path) -> None:
    done = redirected(saying, where, proven)
    assert done.returncode == 1
    assert f"Error: {said}" in done.stderr and "Traceback" not in done.stderr


def test_nothing_said_anywhere_is_an_exit_code_all_the_same(proven: Path) -> None:
    assert redirected("a stream", ">&- 2>&-", proven).returncode == 1
    assert redirected("a stream", "2>&-", proven).returncode == 0


@pytest.mark.parametrize("saying", ["tables", "a stream", "an error as a document"])
def test_a_reader_that_left_is_no_traceback(saying: str, proven: Path) -> None:
    assert "Traceback" not in redirected(saying, "| true", proven).stderr


def redirected(saying: str, where: str, proven: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command whose output goes elsewhere, by the shell's own means."""
    words = [one.format(bundle=proven / "bundle") for one in SAYING[saying]]
    command = f"exec {shlex.join([sys.executable, '-m', 'motrt', *words])} {where}"
    return subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, env=os.environ | environment, cwd=proven)


def test_text_that_the_output_has_no_letters_for_is_escaped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "motrt", "init", str(tmp_path / "世"), "--preset", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\u4e16: tiny" in done.stdout


def test_what_libraries_print_is_not_in_the_document(proven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from motrt.runtime import load

    opened = load.open_session

    def noisy(*arguments: Any) -> Any:
        print("*************** EP Error ***************")
        return opened(*arguments)

    monkeypatch.setattr(load, "open_session", noisy)
    for command in (
        ("generate", proven / "bundle", "--prompt-ids", "0"),
        ("bench", proven / "bundle", "--prompt", "4", "--tokens", "2"),
    ):
        result = run(*command, "--json")
        assert json.loads(result.stdout) and "EP Error" in result.stderr


@pytest.mark.parametrize(
    ("option", "code", "said"), [(("--prompt", "x y"), 2, "this text into ids"), (("--prompt-ids", "1"), 1, "ids [")]
)
def test_a_tokenizer_that_fails_or_panics_is_a_sentence(
    option: tuple[str, str], code: int, said: str, proven: Path, tmp_path: Path
) -> None:
    """It has nothing for unknown words, and its native code panics at every token: none is so long."""
    shutil.copytree(proven / "model", tmp_path / "model")
    made = Tokenizer(models.WordLevel({" " * number: number for number in range(96)}, unk_token="[UNK]"))
    made.decoder = decoders.Strip(" ", 0, 100)
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    assert run("export", tmp_path / "model", tmp_path / "b", "--no-verify").exit_code == 0
    for extra in ((), ("--json",)):
        result = run("generate", tmp_path / "b", *option, "--max-tokens", "3", *extra)
        assert result.exit_code == code
        assert "Error: the tokenizer failed at turning" in result.stderr and said in result.stderr


def test_a_start_token_that_is_there_twice_is_told_once(proven: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(proven / "model", tmp_path / "model")
    made = Tokenizer(models.WordLevel({"<s>": 0, "hello": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.add_special_tokens(["<s>"])
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    assert run("export", tmp_path / "model", tmp_path / "b", "--no-verify").exit_code == 0
    for prompt, count, num_told in (("hello", 2, 0), ("<s>hello", 3, 1), ("hello <s>", 3, 0)):
        caplog.clear()
        told = run_json("generate", tmp_path / "b", "--prompt", prompt, "--max-tokens", "2")
        assert told["phases"][0]["tokens"] == count
        assert [one.levelname for one in caplog.records if "begins with <s>" in one.message] == ["WARNING"] * num_told


def test_a_bundle_that_can_not_be_written_to_is_read_all_the_same(proven: Path, tmp_path: Path) -> None:
    shutil.copytree(proven / "bundle", tmp_path / "b")
    for one in (tmp_path / "b").iterdir():
        one.chmod(0o444)
    (tmp_path / "b").chmod(0o555)
    try:
        before = {one.name: one.stat().st_mtime_ns for one in (tmp_path / "b").iterdir()}
        assert run("generate", tmp_path / "b", "--prompt-ids", "0", "--max-tokens", "1").exit_code == 0
        assert run("inspect", tmp_path / "b").exit_code == 0
        assert {one.name: one.stat().st_mtime_ns for one in (tmp_path / "b").iterdir()} == before
    finally:
        (tmp_path / "b").chmod(0o755)


def test_the_fixture_left_no_partial_folder(proven: Path) -> None:
    assert {one.name for one in proven.iterdir()} == {"model", "bundle"}
    assert is_bundle(proven / "bundle")


def test_what_would_command_a_terminal_is_shown_and_not_sent(tmp_path: Path) -> None:
    from motrt.export.report import printable

    assert printable("\x1b[2J\x9bm\x07 fine\tü 音\n") == "\\x1b[2J\\x9bm\\x07 fine\tü 音\n"
    result = run("inspect", tmp_path / "\x1b[31mred")
    assert result.exit_code == 2
    assert "\x1b[31mred" not in result.stderr
    assert "\\x1b[31mred" in result.stderr


def test_the_prompt_is_counted_in_the_speed_of_the_prefill(proven: Path) -> None:
    told = run_json("generate", proven / "bundle", "--prompt-ids", "0,1,2,0,1", "--max-tokens", "3")
    assert [(one["phase"], one["tokens"]) for one in told["phases"]] == [("prefill, to the first token", 5), ("text decode", 2)]


def test_verify_without_its_checkpoint_is_usage_and_not_a_failed_proof(proven: Path, tmp_path: Path) -> None:
    assert run("verify", proven / "bundle", "--checkpoint", tmp_path / "none").exit_code == 2


def test_each_step_leaves_a_line_where_there_is_no_terminal(proven: Path) -> None:
    assert "hash the bundle: " in run("verify", proven / "bundle").stderr


def test_inspect_tells_which_backends_this_machine_has() -> None:
    from motrt.runtime.backends import ORDER

    told = run_json("inspect", "--backends")
    assert [one["backend"] for one in told["backends"]] == list(ORDER)
    assert next(one for one in told["backends"] if one["backend"] == "onnxruntime")["usable"]
    shown = run("inspect", "--backends").stdout
    assert "what runs it, or why not" in shown and "GPU: " in shown


def test_generate_offers_the_backends_that_load_knows() -> None:
    from motrt.cli import PROMPT_BACKENDS
    from motrt.runtime.load import BACKENDS

    assert PROMPT_BACKENDS == BACKENDS


@pytest.mark.parametrize("option", [("--batch", "2"), ("--version-compatible",), ("--compute-capability", "8.9")])
def test_options_for_engines_need_a_target_that_has_engines(option: tuple[str, ...], proven: Path, tmp_path: Path) -> None:
    result = run("export", proven / "model", tmp_path / "b", *option)
    said = f"{option[0]}: for --target tensorrt and tensorrt-rtx alone"
    assert result.exit_code == 2 and said in result.stderr
