"""What an ONNX file would read and run, told from its bytes before anything runs it.

A bundle's hashes vouch for the bundle's own files, and say nothing of what a graph does with them: the values of any tensor
may lie in any file of the machine, and a loop may never end. So every file is looked through when a bundle is opened, and one
that could have been written by no export is refused: values in another file than the bundle's data file, graphs within nodes
(branches and loops), functions, and operators that are neither standard nor the two of onnxruntime's own that exports write.

The ``onnx`` package is not there where bundles are served, so the few fields that matter are found here, as protobuf lays
messages out (https://protobuf.dev/programming-guides/encoding) and ``onnx.proto`` numbers them. Whether the graph is the
model's is not asked.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# The two operators of onnxruntime's own, by domain and name (``export/onnxruntime_operators.py`` writes them).
OWN_DOMAIN = "com.microsoft"
OWN_ATTENTION, OWN_NORM = "GroupQueryAttention", "SkipSimplifiedLayerNormalization"

_STANDARD = ("", "ai.onnx")
_MOST_TOLD, _MOST_LETTERS = 10, 200

# Field numbers of onnx.proto, by message.
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE_INITIALIZER = 1, 5, 15
_NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE_TENSORS = (5, 10), (6, 11), (22, 23)
_SPARSE_TENSORS = (1, 2)  # values, indices
_TENSOR_EXTERNAL_DATA = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

# Wire types: a number, eight bytes, bytes of a length, four bytes. Groups, which are older, ONNX never had.
_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5
_LARGEST_FIELD = (1 << 29) - 1
_MOST_BYTES = (1 << 31) - 1  # of a message


def graph_problems(file: Path, data_file: str) -> list[str]:
    """Say why an ONNX file must not be opened, as sentences; none where nothing speaks against it.

    Args:
        file: the ONNX file.
        data_file: the name of the one file beside it that its values may lie in.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            return [f"{file.name} has {file.stat().st_size} bytes, more than an ONNX file can have"]
        found = dict.fromkeys(_of_model(memoryview(file.read_bytes()), data_file))
    except OSError as failure:
        return [f"{file.name} can not be read ({failure.strerror})"]
    except ValueError as failure:
        return [f"{file.name} is no ONNX file, or a part of one ({failure})"]
    return [f"{file.name}: {problem}" for problem in list(found)[:_MOST_TOLD]]


def _of_model(model: memoryview, data_file: str) -> Iterator[str]:
    has_nodes = False
    for field, graph in _messages(model):
        if field in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            yield f"it holds {'functions' if field == _MODEL_FUNCTIONS else 'training information'}, which no export writes"
        if field != _MODEL_GRAPH:
            continue
        for part, value in _messages(graph):
            if part == _GRAPH_NODE:
                has_nodes = True
                yield from _of_node(value, data_file)
            elif part == _GRAPH_INITIALIZER:
                yield from _of_tensor(value, data_file)
            elif part == _GRAPH_SPARSE_INITIALIZER:
                yield from _of_sparse_tensor(value, data_file)
    if not has_nodes:
        raise ValueError("it holds no graph")


def _of_node(node: memoryview, data_file: str) -> Iterator[str]:
    words = {_NODE_OP_TYPE: "", _NODE_DOMAIN: ""}
    holds_graphs = False
    for field, value in _messages(node):
        if field in words:
            words[field] = _text(value)
        elif field == _NODE_ATTRIBUTE:
            for kind, held in _messages(value):
                holds_graphs |= kind in _ATTRIBUTE_GRAPHS
                if kind in _ATTRIBUTE_TENSORS:
                    yield from _of_tensor(held, data_file)
                elif kind in _ATTRIBUTE_SPARSE_TENSORS:
                    yield from _of_sparse_tensor(held, data_file)
    operator, domain = words[_NODE_OP_TYPE], words[_NODE_DOMAIN]
    if holds_graphs:
        yield f"{operator} holds a graph of its own, and no export writes branches or loops"
    if domain not in _STANDARD and (domain, operator) not in ((OWN_DOMAIN, OWN_ATTENTION), (OWN_DOMAIN, OWN_NORM)):
        yield f"{operator} is of domain {domain!r}, and no export writes it"


def _of_sparse_tensor(tensor: memoryview, data_file: str) -> Iterator[str]:
    for field, value in _messages(tensor):
        if field in _SPARSE_TENSORS:
            yield from _of_tensor(value, data_file)


def _of_tensor(tensor: memoryview, data_file: str) -> Iterator[str]:
    for field, entry in _messages(tensor):
        if field == _TENSOR_EXTERNAL_DATA:
            words = {part: _text(value) for part, value in _messages(entry)}
            location = words.get(_ENTRY_VALUE, "")
            if words.get(_ENTRY_KEY) == "location" and str(PurePosixPath(location)) != data_file:
                yield f"values lie in {location!r}, and the manifest vouches for those in {data_file} alone"


def _messages(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Give number and bytes of every field that is a message or a string.

    Raises:
        ValueError: where the bytes are no message. What decoders disagree about is none either: what is seen here is what runs.
    """
    place, end = 0, len(message)
    while place < end:
        tag, place = _number(message, place)
        field, kind = tag >> 3, tag & 7
        if not 0 < field <= _LARGEST_FIELD or kind not in (_VARINT, _EIGHT, _LENGTH, _FOUR):
            raise ValueError("its bytes are no protobuf message")
        if kind == _VARINT:
            _, place = _number(message, place)
            continue
        size, place = _number(message, place) if kind == _LENGTH else (8 if kind == _EIGHT else 4, place)
        if size > end - place:
            raise ValueError("it ends too soon")
        if kind == _LENGTH:
            yield field, message[place : place + size]
        place += size


def _number(message: memoryview, place: int) -> tuple[int, int]:
    """The number of variable length at ``place``, seven bits to a byte, and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise ValueError("it ends too soon")
        byte = message[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise ValueError("its bytes are no protobuf message")


def _text(value: memoryview) -> str:
    """A string, or the beginning of one that is longer than any that is looked for."""
    return bytes(value[:_MOST_LETTERS]).decode("utf-8", "replace")
