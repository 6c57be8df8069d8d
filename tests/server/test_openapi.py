"""`/openapi.json` and `/docs`: they describe what the server takes and answers, which is tried here."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from brlite.config.options import KeysConfig
from brlite.dialects.fields import OBEYED
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient


async def test_the_document_describes_every_endpoint(client: Client) -> None:
    status, document = await client.get("/openapi.json")

    assert status == 200
    operations = [(path, each) for path, methods in document["paths"].items() for each in methods.values()]
    own = ("/openapi.json", "/docs", "/ping")
    assert [path for path, each in operations if each["summary"] == path and path not in own] == []


async def test_the_page_of_the_api_has_every_endpoint(client: Client) -> None:
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`(?:GET|POST|DELETE)`?[ ,].*?) \|", page, re.MULTILINE)

    _, document = await client.get("/openapi.json")

    shown = {re.sub(r"{\w+}", "{}", path) for row in rows for path in re.findall(r"(/[\w/{}.-]+)`", row)}
    assert shown == {re.sub(r"{\w+}", "{}", path) for path in document["paths"]}


async def test_every_endpoint_has_a_summary(client: Client) -> None:
    _, document = await client.get("/openapi.json")

    summaries = {path: each["summary"] for path, methods in document["paths"].items() for each in methods.values()}
    assert not {path for path, summary in summaries.items() if summary == path}


async def test_the_document_is_valid(client: Client) -> None:
    validator = pytest.importorskip("openapi_spec_validator", reason="openapi-spec-validator is not installed")

    _, document = await client.get("/openapi.json")

    validator.validate(document)


async def test_a_body_has_the_fields_of_the_table_with_their_bounds(client: Client) -> None:
    _, document = await client.get("/openapi.json")

    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {name for row in OBEYED if "chat" in row.endpoints for name in row.names.split()} <= set(fields)
    assert fields["top_p"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert fields["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0}
    assert fields["mirostat"]["enum"] == [None, 0]


async def test_what_loads_a_model_says_what_it_takes(client: Client) -> None:
    _, document = await client.get("/openapi.json")

    for path in ("/models/load", "/models/unload"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": "#/components/schemas/ModelAction"}
    action = document["components"]["schemas"]["ModelAction"]
    assert (list(action["properties"]), action["additionalProperties"]) == (["model"], False)


async def test_the_page_needs_nothing_from_elsewhere_and_no_key(make_client: MakeClient) -> None:
    client = await make_client(config={"keys": KeysConfig(keys=("secret",))})

    async with client.session.get(client.url + "/docs") as response:
        page = await response.text()

    assert (response.status, response.content_type) == (200, "text/html")
    assert (await client.get("/openapi.json"))[0] == 200
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.search(r"<script|<link|<img|@import|url\(|https?://", page)
    assert "<code>POST /v1/chat/completions</code>" in page
    assert "<code>temperature</code></td><td>number from 0</td>" in page
    assert "<code>top_p</code></td><td>number above 0 to 1</td>" in page


async def test_the_server_answers_as_the_document_says(client: Client, tmp_path: Path) -> None:
    """Requests that schemathesis makes from the document, right ones and wrong ones."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    program = shutil.which("st", path=str(Path(sys.executable).parent))
    assert program is not None
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = ["--max-examples", "2", "--phases", "fuzzing", "--seed", "7", "--workers", "1"]

    process = await asyncio.create_subprocess_exec(
        *(program, "run", f"{client.url}/openapi.json", "--checks", checks, *options, "--no-color"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    printed, _ = await asyncio.wait_for(process.communicate(), 10 * PATIENCE_SECONDS)

    assert process.returncode == 0, printed.decode()
