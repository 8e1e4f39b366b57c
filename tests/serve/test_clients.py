"""Clients that others wrote: OpenAI's own, curl, and one that tries whatever the OpenAPI document allows and forbids."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from motrt.tests.serve.served import Serve, Served

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_openais_client_gets_text_and_audio(client: openai.OpenAI) -> None:
    said = client.completions.create(
        model="tiny", prompt=[1, 2, 3], temperature=0, seed=1, extra_body={"schedule": "text:2,audio:2f"}
    )
    choice = said.choices[0]
    assert choice.finish_reason == "stop"
    assert len(choice.model_dump()["token_ids"]) == 10
    assert [len(frame) for frame in choice.model_dump()["audio"]["frames"]] == [4, 4]
    assert said.usage is not None
    assert said.usage.completion_tokens_details is not None
    assert said.usage.completion_tokens_details.audio_tokens == 8


def test_openais_client_reads_a_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny",
        prompt=[1, 2, 3],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"audio_frames": 3},
    )
    *pieces, last = list(stream)
    frames = [frame for piece in pieces for frame in (piece.choices[0].model_dump()["audio"] or {"frames": []})["frames"]]
    assert len(frames) == 3
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens == 12


def test_openais_client_knows_the_errors(client: openai.OpenAI, serve: Serve, tmp_path: Path) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="serves one model"):
        client.completions.create(model="gpt", prompt=[1])
    with pytest.raises(openai.BadRequestError, match="send a request for each"):
        client.completions.create(model="tiny", prompt=["a", "b"])
    (tmp_path / "keys").write_text("a-key-of-sixteen-characters\n")
    with serve(api_key_file=tmp_path / "keys") as locked, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="none", max_retries=0).models.list()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_readmes_curl_works_as_written(served: Served) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.index("curl localhost:8000/v1/completions")
    command = text[start : text.index("\n```", start)].replace("localhost:8000", f"127.0.0.1:{served.port}")
    command = command.replace('"model": "bundle"', '"model": "tiny"').replace(
        "curl ", "curl -sS --fail-with-body --max-time 20 "
    )
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["choices"][0]["audio"]["frames"]


def test_the_openapi_document_is_kept_whatever_is_sent(served: Served, tmp_path: Path) -> None:
    """About two hundred cases; ``docs/serving.md`` has the command for ten thousand."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"),
        *("--max-examples", "20", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--no-color"),
        *("--exclude-checks", "positive_data_acceptance", "--generation-database", "none"),
    ]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-2000:]
