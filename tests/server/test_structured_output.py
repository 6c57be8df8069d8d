"""`response_format` and its like over HTTP: streamed and whole, in the words of each server."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from brlite.config.options import DEFAULT_MODEL, ModelSpec
from tests.fakes import EOS
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import MODEL, Client, chat_body, completion_body

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}, "visits": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "visits"],
    "additionalProperties": False,
}
DIGITS = r"^\d{3}-[a-c]{2}$"
WISHES: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}}, "schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA, "strict": True}}},
        "schema",
    ),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "schema"),
    ({"guided_json": SCHEMA}, "schema"),
    ({"guided_json": json.dumps(SCHEMA)}, "schema"),
    ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, "schema"),
    ({"structured_outputs": {"json": SCHEMA}}, "schema"),
    ({"json_schema": SCHEMA}, "schema"),
    ({"json_schema": json.dumps(SCHEMA)}, "schema"),
    ({"guided_regex": DIGITS}, DIGITS),
    ({"structured_outputs": {"regex": DIGITS}}, DIGITS),
    ({"regex": DIGITS}, DIGITS),
    ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    ({"guided_grammar": 'start: "a" | "bc"\n'}, "a|bc"),
    ({"structured_outputs": {"grammar": 'root ::= "a" | "bc"'}}, "a|bc"),
    ({"grammar": 'root ::= "a" | "bc"'}, "a|bc"),
    ({"ebnf": 'root ::= "a" | "bc"'}, "a|bc"),
]


def noise(context: Sequence[int], seed: int) -> int:
    digest = blake2b(repr((list(context), seed)).encode(), digest_size=2).digest()
    return int.from_bytes(digest, "little") % (EOS + 1)


@pytest.fixture
async def client(make_client: Callable[..., Awaitable[Client]]) -> Client:
    return await make_client(next_token=noise, max_model_len=512, num_blocks=512)


def check(text: str, expected: str) -> None:
    if expected == "schema":
        answer = json.loads(text)
        assert list(answer) == ["city", "visits"]
        assert answer["city"] in ("Bern", "Rome")
        assert 1 <= answer["visits"] <= 9
    else:
        assert re.fullmatch(expected, text)


@pytest.mark.parametrize(("wish", "expected"), WISHES, ids=lambda value: json.dumps(value)[:60])
async def test_an_answer_matches_in_each_servers_words(client: Client, wish: dict[str, Any], expected: str):
    whole = (await client.chat(**wish, max_tokens=100))["choices"][0]
    events = await client.stream(CHAT, chat_body(**wish, max_tokens=100))
    completion = (await client.complete(**wish, max_tokens=100))["choices"][0]

    check(whole["message"]["content"], expected)
    check(completion["text"], expected)
    assert whole["finish_reason"] == completion["finish_reason"] == "stop"
    streamed = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert streamed == whole["message"]["content"]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"guided_json": None},
        {"json_schema": {}},
        {"grammar": ""},
        {"structured_outputs": {}},
        {"guided_choice": []},
    ],
)
async def test_no_wish_leaves_the_answer_as_it_is(client: Client, fields: dict[str, Any]):
    assert (await client.chat(**fields))["choices"] == (await client.chat())["choices"]


@pytest.mark.parametrize("empty", ["{\n}", "{ \t}", '""', "null"])
async def test_an_empty_schema_is_none_however_it_is_written(client: Client, empty: str):
    body = json.dumps(chat_body())[:-1] + f', "json_schema": {empty}}}'

    _, answer = await client.post("/v1/chat/completions", body.encode())

    assert answer["choices"] == (await client.chat())["choices"]


async def test_several_answers_to_several_prompts_each_match(client: Client):
    answer = await client.complete(["a", "b"], n=3, guided_json=SCHEMA, max_tokens=100, temperature=1.2, seed=3)

    assert len(answer["choices"]) == 6
    for choice in answer["choices"]:
        check(choice["text"], "schema")


async def test_whitespace_is_there_where_a_pattern_allows_it(client: Client):
    fields = {"guided_json": SCHEMA, "max_tokens": 200, "temperature": 1, "n": 8}

    compact = await client.chat(**fields)
    spaced = await client.chat(**fields, guided_whitespace_pattern=" ?")

    assert not any(" " in choice["message"]["content"] for choice in compact["choices"])
    assert any(" " in choice["message"]["content"] for choice in spaced["choices"])


async def test_an_answer_cut_by_length_says_so(client: Client):
    choice = (await client.chat(guided_json=SCHEMA, max_tokens=5))["choices"][0]

    assert choice["message"]["content"] == '{"cit'
    assert choice["finish_reason"] == "length"


async def test_openais_client_parses_a_pydantic_model(client: Client):
    class Trip(BaseModel):
        city: str
        visits: int

    async with openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0) as api:
        completion = await api.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "where"}],
            response_format={"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}},
            max_tokens=100,
        )

    assert Trip.model_validate_json(completion.choices[0].message.content or "").visits >= 1


async def test_the_example_of_the_page_runs(make_client: Callable[..., Awaitable[Client]]) -> None:
    config = {"model": (ModelSpec(name=DEFAULT_MODEL),)}
    client = await make_client(next_token=noise, max_model_len=512, num_blocks=512, config=config)
    page = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text(encoding="utf-8")
    section = page.split("## With the `openai` package")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    code = example.replace("http://127.0.0.1:8000", client.url)

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    printed, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)

    assert process.returncode == 0
    assert re.fullmatch(rb"\{'city': .+, 'is_capital': (True|False)\}\nname=.+ is_capital=(True|False)\n", printed)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "banana"}}, "response_format.type", "banana"),
    ({"response_format": {}}, "response_format.type", "type"),
    ({"response_format": "json_object"}, "response_format", "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format", "#/not"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format", "a schema is"),
    (
        {"guided_json": {"type": "object", "properties": {"a": {"contains": {}}}}},
        "guided_json",
        "#/properties/a/contains",
    ),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_regex": "(?=a)"}, "guided_regex", "look-around"),
    ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_choice", "only one of"),
    ({"guided_choice": [""]}, "guided_choice", "texts"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"frob": 1}}, "structured_outputs", "frob"),
    (
        {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
        "structured_outputs.disable_additional_properties",
        "not supported",
    ),
    ({"grammar": "root ::= missing"}, "grammar", "missing"),
    ({"ebnf": "("}, "ebnf", ""),
    ({"structural_tag": {"format": {}}}, "structural_tag", "not supported"),
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("wish", "param", "reason"), REFUSED, ids=lambda value: json.dumps(value)[:60])
async def test_what_cannot_be_obeyed_is_a_400_before_the_first_byte(
    client: Client, wish: dict[str, Any], param: str, reason: str, is_streamed: bool
):
    for path, body in ((CHAT, chat_body(**wish)), (COMPLETIONS, completion_body(**wish))):
        status, answer = await client.post(path, {**body, "stream": is_streamed})

        assert status == 400, answer
        assert (answer["error"]["param"] or "").startswith(param)
        assert reason in answer["error"]["message"]


async def test_a_structural_tag_is_taken_in_response_format(client: Client):
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<call>", "schema": SCHEMA, "end": "</call>"}],
        "triggers": ["<call>"],
    }

    choice = (await client.chat(response_format=tag, max_tokens=30))["choices"][0]

    assert choice["finish_reason"] in ("stop", "length")
