"""The bundle's own word for itself: any changed byte is found, and what is not this version's is told apart from damage."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motrt.errors import BundleError
from motrt.export.verification import verify_bundle
from motrt.runtime.bundle import FORMAT_VERSION, MANIFEST_FILE, is_bundle, open_bundle, record_files, write_manifest
from motrt.runtime.load import load

FILES = ("manifest.json", "model.onnx", "model.onnx.data")


def flip(file: Path, place: int, bits: int = 1) -> None:
    held = bytearray(file.read_bytes())
    held[place] ^= bits
    file.write_bytes(held)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it a right hash of itself: what a forger, or another version, would write."""
    file = folder / MANIFEST_FILE
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    write_values(file, values)


def write_values(file: Path, values: dict[str, Any]) -> None:
    body = {name: value for name, value in values.items() if name != "manifest_sha256"}
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["manifest_sha256"] = hashlib.sha256(plain.encode()).hexdigest()
    file.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def test_a_bundle_says_what_it_holds(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle, "hash")
    assert set(bundle.manifest.files) == {"model.onnx", "model.onnx.data"}
    assert (bundle.manifest.precision, bundle.manifest.parity, bundle.tokenizer_path) == ("fp32", None, None)
    assert is_bundle(tiny_bundle)


def test_a_manifest_written_again_is_the_same(bundle_copy: Path) -> None:
    before = (bundle_copy / MANIFEST_FILE).read_bytes()
    write_manifest(bundle_copy, open_bundle(bundle_copy).manifest)
    assert (bundle_copy / MANIFEST_FILE).read_bytes() == before


def test_any_flipped_byte_of_the_manifest_is_found_without_asking(bundle_copy: Path) -> None:
    file = bundle_copy / MANIFEST_FILE
    before = file.read_bytes()
    for place in range(0, len(before), 31):
        for bits in (1, 7, 32, 128):  # 7 makes a carriage return of a line feed, 32 a capital of a letter
            flip(file, place, bits)
            with pytest.raises(BundleError):
                open_bundle(bundle_copy)
            file.write_bytes(before)
    open_bundle(bundle_copy)


def test_line_ends_of_another_system_are_a_changed_manifest(bundle_copy: Path) -> None:
    file = bundle_copy / MANIFEST_FILE
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(BundleError, match="was changed after the export"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", FILES[1:])
def test_any_flipped_byte_of_another_file_is_found_by_hash(name: str, bundle_copy: Path) -> None:
    file = bundle_copy / name
    size = file.stat().st_size
    for place in [0, size - 1, *random.Random(0).sample(range(size), 20)]:
        flip(file, place)
        with pytest.raises(BundleError, match=rf"(?s)is damaged; export it again:.*{name} is not the file that was exported"):
            open_bundle(bundle_copy, "hash")
        flip(file, place)
    open_bundle(bundle_copy, "hash")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_refused_by_loading_with_hashes_and_by_verify(name: str, bundle_copy: Path) -> None:
    flip(bundle_copy / name, (bundle_copy / name).stat().st_size // 2)
    with pytest.raises(BundleError):
        load(bundle_copy, check="hash")
    with pytest.raises(BundleError):
        verify_bundle(bundle_copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "harm", ["one byte less", "one byte more", "empty", "missing", "a folder", "a link that leads nowhere"]
)
def test_a_file_of_another_size_or_kind_is_found_without_asking(name: str, harm: str, bundle_copy: Path) -> None:
    file = bundle_copy / name
    held = file.read_bytes()
    file.unlink()
    if harm == "a folder":
        file.mkdir()
    elif harm == "a link that leads nowhere":
        file.symlink_to(bundle_copy / "nowhere")
    elif harm != "missing":
        file.write_bytes({"one byte less": held[:-1], "one byte more": held + b"\n", "empty": b""}[harm])
    with pytest.raises(BundleError, match=name):
        open_bundle(bundle_copy)


def test_every_damaged_file_is_named(bundle_copy: Path) -> None:
    for name in FILES[1:]:
        (bundle_copy / name).unlink()
    with pytest.raises(BundleError) as failure:
        open_bundle(bundle_copy)
    assert all(f"{name} is missing" in str(failure.value) for name in FILES[1:])


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_behind_a_link_is_found(name: str, bundle_copy: Path, tmp_path: Path) -> None:
    shutil.move(bundle_copy / name, tmp_path / "elsewhere")
    (bundle_copy / name).symlink_to(tmp_path / "elsewhere")
    open_bundle(bundle_copy, "hash")
    flip(tmp_path / "elsewhere", 1000)
    with pytest.raises(BundleError, match="is damaged" if name != MANIFEST_FILE else "manifest"):
        open_bundle(bundle_copy, "hash")


@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong_with_a_file_or_a_link_is_said_and_is_no_damage(name: str, bundle_copy: Path, tmp_path: Path) -> None:
    file = bundle_copy / name
    file.unlink()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    links = {
        "nowhere": f"{name} is a link to nowhere, which is not there",
        name: f"{name} is a link that leads back to itself",
        str(tmp_path / "folder"): rf"{name} is a link to .*folder, a folder",
        str(tmp_path / "pipe"): rf"{name} is a link to .*pipe, no regular file",
    }
    for target, said in links.items():
        file.symlink_to(target)
        with pytest.raises(BundleError, match=said) as caught:
            open_bundle(bundle_copy)
        assert "damaged" not in str(caught.value)
        file.unlink()
    os.mkfifo(file)
    with pytest.raises(BundleError, match=f"{name} is no regular file"):
        open_bundle(bundle_copy)


def test_a_folder_that_is_a_link_to_nowhere_is_told_from_one_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to("gone")
    with pytest.raises(BundleError, match="is a link to gone, which is not there: give a bundle's folder"):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\x00b", "a\nb"])
def test_names_that_are_no_plain_file_names_are_refused(name: str, bundle_copy: Path) -> None:
    record = {"bytes": 1, "sha256": "0" * 64}
    rewrite(bundle_copy, lambda values: values["files"].update({name: record}))
    with pytest.raises(BundleError, match="no plain file name"):
        open_bundle(bundle_copy)


def test_a_newer_format_is_not_called_damage(bundle_copy: Path) -> None:
    file = bundle_copy / MANIFEST_FILE
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({"format_version": FORMAT_VERSION + 1, "whatever": values}), encoding="utf-8")
    with pytest.raises(BundleError, match=rf"has format {FORMAT_VERSION + 1} and this motrt reads up to {FORMAT_VERSION}: upg"):
        open_bundle(bundle_copy)


def test_a_newer_contract_is_not_called_damage_though_its_configuration_is_unknown_here(bundle_copy: Path) -> None:
    def newer(values: dict[str, Any]) -> None:
        values["signature"]["contract_version"] = 99
        values["config"]["telepathy"] = True

    rewrite(bundle_copy, newer)
    with pytest.raises(BundleError, match=r"keeps graph contract 99 .* upgrade motrt"):
        open_bundle(bundle_copy)


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no configuration": lambda values: values.pop("config"),
    "no files": lambda values: values.pop("files"),
    "no parity": lambda values: values.pop("parity"),
    "files that are a list": lambda values: values.update(files=["model.onnx"]),
    "files without a graph": lambda values: values["files"].pop("model.onnx"),
    "files without weights": lambda values: values["files"].pop("model.onnx.data"),
    "a size that is no number": lambda values: values["files"]["model.onnx"].update(bytes="many"),
    "another precision": lambda values: values.update(precision="fp7"),
    "a precision that is a list": lambda values: values.update(precision=["fp32"]),
    "the signature of another precision": lambda values: values.update(precision="fp16"),
    "another configuration": lambda values: values["config"].update(num_layers=3),
    "an impossible configuration": lambda values: values["config"].update(num_layers=-1),
    "a configuration that is a number": lambda values: values.update(config=7),
    "a contract that is no number": lambda values: values["signature"].update(contract_version="new"),
    "a signature that is a list": lambda values: values.update(signature=[]),
    "a source without a path": lambda values: values.update(source={}),
    "a source that is nothing": lambda values: values.update(source=None),
    "versions that are a number": lambda values: values.update(versions=3),
    "parity that is a number": lambda values: values.update(parity=1),
    "parity without a verdict": lambda values: values.update(parity={"backend": "onnxruntime"}),
    "versions that are a list": lambda values: values.update(versions=["1"]),
    "operators without numbers": lambda values: values.update(operators={"Gemm": "many"}),
    "operators whose number is a list": lambda values: values.update(operators={"Gemm": [1]}),
    "operators that are a number": lambda values: values.update(operators=3),
    "weights that lie nowhere": lambda values: values.update(weight_places={"norm.weight": [float("inf"), 4]}),
    "weights of another size": lambda values: values.update(weight_places={"norm.weight": [0, 4]}),
    "weights that no model has": lambda values: values.update(weight_places={"enorm.weight": [0, 4]}),
    "weight places that are a list": lambda values: values.update(weight_places=[1]),
    "an older format": lambda values: values.update(format_version=0),
    "a format that is a word": lambda values: values.update(format_version="1"),
    "no format": lambda values: values.pop("format_version"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest_is_a_sentence_even_where_its_own_hash_is_right(forgery: str, bundle_copy: Path) -> None:
    rewrite(bundle_copy, FORGERIES[forgery])
    with pytest.raises(BundleError, match="export"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"manifest"',
        b"\xff\xfe{\x00}\x00",
        b"\x80",
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"format_version": ' + b"1" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
    ids=["empty", "object", "list", "null", "word", "utf-16", "no utf-8", "deep list", "deep object", "huge number", "a mark"],
)
def test_a_manifest_that_is_something_else_is_a_sentence(content: bytes, bundle_copy: Path) -> None:
    (bundle_copy / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(BundleError, match="export the bundle again"):
        open_bundle(bundle_copy)


def test_a_manifest_too_large_to_be_one_is_not_read(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(bundle_copy / MANIFEST_FILE, 1 << 40)  # sparse: a terabyte of nothing
    with pytest.raises(BundleError, match="1099511627776 bytes, so it is no manifest"):
        open_bundle(bundle_copy)


def test_what_is_no_bundle_is_told_from_what_is_not_there(tmp_path: Path, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    for path, said in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path, "has no manifest.json, so it is no bundle: make one with `motrt export`"),
        (tiny_bundle / "model.onnx", "is not a folder"),
    ):
        with pytest.raises(BundleError, match=said):
            load(path)
    with pytest.raises(BundleError, match="no bundle"):
        load(tiny_checkpoint, backend="onnxruntime")


def test_files_beside_the_bundles_own_do_no_harm(bundle_copy: Path) -> None:
    (bundle_copy / ".DS_Store").write_bytes(b"x")
    (bundle_copy / "notes.txt").write_text("served on two machines")
    open_bundle(bundle_copy, "hash")


def test_a_file_that_can_not_be_read_is_a_sentence(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: Any) -> str:
        raise PermissionError(13, "Permission denied", "model.onnx")

    monkeypatch.setattr("motrt.runtime.bundle.sha256_of", denied)
    with pytest.raises(BundleError, match=r"model.onnx can not be read \(Permission denied\)"):
        open_bundle(bundle_copy, "hash")


def lead_out(folder: Path, location: str) -> None:
    """Make the graph read its weights at ``location``, and the manifest vouch for that."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, folder / "model.onnx")
    records = {name: {"bytes": one.num_bytes, "sha256": one.sha256} for name, one in record_files(folder).items()}
    rewrite(folder, lambda values: values.update(files=records))


@pytest.mark.parametrize("way", ["upwards", "absolute"])
def test_a_graph_that_reads_weights_outside_its_bundle_is_not_run(way: str, bundle_copy: Path) -> None:
    outside = bundle_copy.parent / "elsewhere"
    shutil.copy(bundle_copy / "model.onnx.data", outside)
    lead_out(bundle_copy, "../elsewhere" if way == "upwards" else str(outside))
    with pytest.raises(BundleError, match=r"model.onnx: values lie in '.*elsewhere'"):
        load(bundle_copy)


def test_the_same_change_that_stays_inside_is_run(bundle_copy: Path) -> None:
    lead_out(bundle_copy, "./model.onnx.data")
    with load(bundle_copy, check="hash") as session:
        assert np.isfinite(session.prefill([[1]], "text")[0][:, :96]).all()


ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**63, 10**400, 1.5, 1e308, float("nan"), float("-inf"), "", "a", "../x", "\0", "\ud800",
    [], [1], [[]], [None], {}, {"a": 1}, {"": {}}, ["x"] * 3,
)  # fmt: skip


def places(values: Any, behind: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values lie in a manifest; of long lists the first alone."""
    found = values.items() if isinstance(values, dict) else enumerate(values[:2]) if isinstance(values, list) else ()
    for key, value in found:
        yield (*behind, key)
        yield from places(value, (*behind, key))


def odd(values: dict[str, Any], chance: random.Random) -> None:
    """Put something else in a place or two, and leave things out."""
    for _ in range(chance.choice((1, 1, 2))):
        *way, last = chance.choice(list(places(values)))
        held: Any = values
        for key in way:
            held = held[key]
        if chance.random() < 0.8:
            held[last] = chance.choice(ODD)
        else:
            del held[last]


def test_odd_values_anywhere_in_a_manifest_are_sentences_or_harmless(bundle_copy: Path) -> None:
    file = bundle_copy / MANIFEST_FILE
    whole, opened = file.read_text(encoding="utf-8"), 0
    for number in range(250):
        values = json.loads(whole)
        values["engines"] = [{"graph": "g", "ranges": {"b": [1, 2, 3]}}] if number % 9 == 0 else []
        values["parity"] = {"verdict": "PASS", "backend": "onnxruntime"}
        odd(values, random.Random(number))
        write_values(file, values)
        try:
            bundle = open_bundle(bundle_copy)
        except BundleError:
            continue
        opened += 1
        assert all(isinstance(count, int) for count in bundle.manifest.operators.values())
        assert bundle.manifest.parity is None or set(map(type, bundle.manifest.parity.values())) == {str}
    assert 0 < opened < 125


def test_a_manifest_that_says_a_thing_twice_is_refused(bundle_copy: Path) -> None:
    file = bundle_copy / MANIFEST_FILE
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('{\n "answer"', '{\n "precision": "fp16",\n "answer"'), encoding="utf-8")
    with pytest.raises(BundleError, match="was changed after the export"):
        open_bundle(bundle_copy)
