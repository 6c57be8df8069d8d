"""llama.cpp's `/infill`: what fills a gap between two texts, in its fields and in the shape of its answers."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from brlite.config.options import LimitsConfig
from brlite.dialects.event import Event, TokenUsage
from brlite.dialects.llama_infill import InfillEncoder, decode
from brlite.sampling_params import StructuredOutput
from brlite.tokenizer import Tokenizer
from brlite.tokenizer.infill import InfillTokens
from tests.fakes import ByteTokenizer
from tests.server.conftest import Client, MakeClient

BODY = {"input_prefix": "ab", "input_suffix": "cd", "n_predict": 4, "temperature": 0}


class RepositoryTokenizer(ByteTokenizer):
    """Its vocabulary has tokens for the names of a repository and of files."""

    infill = InfillTokens(257, 258, 259, repository=128, file=129)


def next_letter(context: list[int], seed: Any) -> int:
    return b"abcd"[len(context) % 4]


async def stream(client: Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with client.session.post(client.url + "/infill", json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


async def rendered(client: Client, body: dict[str, Any]) -> tuple[str, list[str]]:
    status, answer = await client.post("/explain?endpoint=/infill", body)
    assert status == 200, answer
    return answer["prompts"][0]["text"], answer["warnings"]


async def test_an_answer_has_llama_cpps_shape(make_client: MakeClient) -> None:
    client = await make_client(next_token=next_letter)

    status, answer = await client.post("/infill", {**BODY, "return_tokens": True})

    assert status == 200, answer
    assert answer == {
        "index": 0,
        "content": "dabc",  # behind 7 tokens of prompt
        "tokens": [*b"dabc"],
        "stop": True,
        "model": "fake",
        "tokens_predicted": 4,
        "tokens_evaluated": 7,
        "tokens_cached": 0,
        "has_new_line": False,
        "truncated": False,
        "stop_type": "limit",
        "stopping_word": "",
    }


async def test_a_stream_has_the_same_and_ends_with_a_chunk_that_says_why(make_client: MakeClient) -> None:
    client = await make_client(next_token=next_letter)
    _, whole = await client.post("/infill", {**BODY, "return_tokens": True, "stop": "c"})

    *chunks, last = await stream(client, {**BODY, "stop": "c"})

    assert "".join(chunk["content"] for chunk in chunks) == whole["content"] == "dab"
    assert [token for chunk in chunks for token in chunk["tokens"]] == whole["tokens"]
    assert [chunk["stop"] for chunk in chunks] == [False] * len(chunks)
    assert last == {**whole, "content": "", "tokens": [], "tokens_cached": last["tokens_cached"]}
    assert (last["stop_type"], last["stopping_word"]) == ("word", "c")


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "<257>ab<258>cd<259>"),
        ({"input_suffix": ""}, "<257>ab<258><259>"),
        ({"input_prefix": "", "input_suffix": ""}, "<257><258><259>"),
        ({"prompt": "xy"}, "<257>ab<258>cd<259>xy"),
        ({"input_extra": []}, "<257>ab<258>cd<259>"),
    ],
)
async def test_a_gap_stays_a_gap_beside_an_empty_text_and_the_prompt_starts_the_answer(
    client: Client, fields: dict[str, Any], prompt: str
) -> None:
    assert await rendered(client, {**BODY, **fields}) == (prompt, [])


async def test_other_files_stand_before_it_by_name_where_the_vocabulary_can_say_so(make_client: MakeClient) -> None:
    client = await make_client(tokenizer=RepositoryTokenizer())
    extra = [{"filename": "a.py", "text": "one\n"}, {"text": "two\n"}]

    status, answer = await client.post("/infill", {**BODY, "input_extra": extra})
    text, warnings = await rendered(client, {**BODY, "input_extra": extra})

    names = (
        "\ufffdmyproject\n",
        "\ufffda.py\none\n",
        "\ufffdtmp\ntwo\n",
        "\ufffdfilename\n",
    )  # 128 and 129 are no text
    assert text == "".join(names) + "<257>ab<258>cd<259>"
    assert (status, answer["tokens_evaluated"], warnings) == (200, sum(map(len, names)) + 7, [])


async def test_without_such_tokens_their_texts_stand_there_with_a_warning(client: Client) -> None:
    body = {**BODY, "input_extra": [{"filename": "a.py", "text": "one"}]}

    text, (warning,) = await rendered(client, body)
    status, answer = await client.post("/infill", body)
    refused, error = await client.post("/infill", {**body, "strict": True})

    assert text == "\n\n--- snippet ---\n\none<257>ab<258>cd<259>"
    assert (status, answer["warnings"]) == (200, [warning])
    assert (refused, error["error"]["code"]) == (400, "strict")


async def test_no_tokens_fill_the_cache_for_the_next_request(make_client: MakeClient) -> None:
    client = await make_client(next_token=next_letter)
    body = {**BODY, "input_prefix": "a" * 40}

    _, none = await client.post("/infill", {**body, "n_predict": 0, "return_tokens": True})
    (streamed,) = await stream(client, {**body, "n_predict": 0})
    _, answer = await client.post("/infill", body)

    assert (none["content"], none["tokens"], none["tokens_predicted"], none["stop_type"]) == ("", [], 0, "limit")
    assert (streamed["content"], streamed["stop"], streamed["tokens_predicted"]) == ("", True, 0)
    assert answer["tokens_cached"] > 0 == none["tokens_cached"]


async def test_the_answer_ends_at_a_token_that_begins_another_file(make_client: MakeClient) -> None:
    client = await make_client(next_token=lambda context, seed: b"abx"[len(context) % 3])

    _, answer = await client.post("/infill", {**BODY, "n_predict": -1})

    assert (answer["content"], answer["stop_type"]) == ("b", "eos")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_suffix": None}, "input_suffix"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra[0].text"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"n": 2}, "n"),
        ({"n_cmpl": 2}, "n_cmpl"),
        ({"n_probs": 3}, "n_probs"),
        ({"samplers": ["top_p", "top_k"]}, "samplers"),
        ({"samplers": ["top_k", "top_k"]}, "samplers"),
        ({"samplers": ["mirostat"]}, "samplers"),
        ({"n_indent": -1}, "n_indent"),
        ({"lora": [{"id": 0, "scale": 0.5}]}, "lora"),
        ({"n_predict": -2}, "n_predict"),
        ({"stop": ["a"] * 1000}, "stop"),
        ({"stop_words": ["a"] * 1000}, "stop_words"),
        ({"input_prefix": "a" * 10000}, "input_prefix"),
        ({"input_extra": [{"text": "a" * 10000}]}, "input_prefix"),
        ({"input_extra": [{"text": ""}] * 5}, "input_extra"),
        ({"suffix": "b"}, "suffix"),
    ],
)
async def test_what_cannot_be_obeyed_is_refused_by_the_clients_name(
    make_client: MakeClient, fields: dict[str, Any], param: str
) -> None:
    client = await make_client(limits={"max_messages": 4})

    status, answer = await client.post("/infill", {**BODY, **fields})

    assert (status, answer["error"]["param"]) == (400, param), answer


async def test_a_vocabulary_without_tokens_for_gaps_is_a_refusal_that_says_so(make_client: MakeClient) -> None:
    class PlainTokenizer(ByteTokenizer):
        infill = None
        encode_infill = Tokenizer.encode_infill

    client = await make_client(tokenizer=PlainTokenizer())

    status, answer = await client.post("/infill", BODY)

    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "input_suffix", "unsupported_parameter")
    assert answer["error"]["message"].startswith("input_suffix cannot be obeyed: the model's vocabulary")


def test_why_an_answer_was_ended_is_a_warning_in_it() -> None:
    usage = TokenUsage(3, 1, 0)
    event = Event(choice=0, text="a", finish_reason="error", stop_reason="no token is left", usage=usage)
    call = decode(json.dumps(BODY).encode(), LimitsConfig())

    whole = json.loads(InfillEncoder(call, "infill-1", "fake", "").whole([event], usage, ["one"]))
    _, last, _ = InfillEncoder(call, "infill-1", "fake", "").encode(event).split(b"\n\n")

    assert whole["warnings"] == ["one", "the answer was ended: no token is left"]
    assert (whole["stop_type"], whole["stopping_word"]) == ("none", "")
    assert json.loads(last.removeprefix(b"data: "))["warnings"] == whole["warnings"][1:]


def test_other_names_of_parameters_and_the_fields_of_all_dialects_are_obeyed() -> None:
    fields = {
        "repeat_penalty": 1.5,
        "stop_words": ["x"],
        "top_n_sigma": 2,
        "cache_salt": "s",
        "grammar": "root ::= [a]",
    }
    body = {**BODY, **fields}

    call = decode(json.dumps(body).encode(), LimitsConfig())

    params = call.params
    assert (params.repetition_penalty, params.stop, params.top_n_sigma, params.max_tokens) == (1.5, ("x",), 2, 4)
    assert (call.cache_salt, params.structured) == ("s", StructuredOutput(grammar="root ::= [a]", param="grammar"))


# As the editors' extensions send them.
FILES = [{"text": "int b;\n", "time": [1, 2], "filename": "b.c"}]
COMMON: dict[str, Any] = {"id_slot": 0, "input_extra": FILES, "cache_prompt": True, "prompt": "", "stream": False}
SENT_BY_EDITORS: dict[str, dict[str, Any]] = {
    "llama.vim": {
        "n_predict": 128,
        "stop": [],
        "n_indent": 4,
        "top_k": 40,
        "top_p": 0.9,
        "samplers": ["top_k", "top_p", "infill"],
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 500,
        "response_fields": ["content", "timings/prompt_n", "timings/predicted_ms", "truncated", "tokens_cached"],
    },
    "llama.vim, ahead": {
        "n_predict": 0,
        "temperature": 0.0,
        "samplers": [],
        "t_max_prompt_ms": 1,
        "t_max_predict_ms": 1,
        "response_fields": [""],
    },
    "llama.vscode": {
        "n_predict": 128,
        "top_k": 40,
        "top_p": 0.99,
        "samplers": ["top_k", "top_p", "infill"],
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 2500,
    },
}


@pytest.mark.parametrize("editor", SENT_BY_EDITORS)
async def test_what_an_editor_sends_is_answered(make_client: MakeClient, editor: str) -> None:
    client = await make_client(next_token=next_letter, tokenizer=RepositoryTokenizer())
    body = {"input_prefix": "int a;\n", "input_suffix": "\n", **COMMON, **SENT_BY_EDITORS[editor]}

    status, answer = await client.post("/infill", body)

    assert status == 200, answer
    assert "response_fields" not in str(answer.get("warnings"))
    if body["n_predict"]:
        assert set(answer["content"]) == set("abcd")
    if editor == "llama.vim":
        assert answer.keys() == {"content", "truncated", "tokens_cached", "warnings"}
        assert any("infill" in line for line in answer["warnings"])


async def test_a_field_that_no_answer_has_is_said(make_client: MakeClient) -> None:
    client = await make_client(next_token=next_letter, tokenizer=RepositoryTokenizer())

    _, answer = await client.post("/infill", {**BODY, "response_fields": ["frob", "timings", "stop"]})
    _, nothing = await client.post("/infill", {**BODY, "response_fields": ["frob"]})

    said = ["response_fields: the answer has none of ['frob']"]
    assert (answer, nothing) == ({"stop": True, "warnings": said}, {"warnings": said})


def test_only_the_listed_samplers_run() -> None:
    fields = {"samplers": ["penalties", "top_k", "min_p"], "top_k": 7, "top_p": 0.5, "temperature": 0.3, "min_p": 0.1}

    call = decode(json.dumps({**BODY, **fields}).encode(), LimitsConfig())

    params = call.params
    assert (params.top_k, params.min_p, params.top_p, params.temperature, params.xtc_probability) == (7, 0.1, 1, 1, 0)
    assert call.unset == ("repetition_penalty",)  # the model's own default of a sampler that is listed


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a\n  b\nc\n  d", "a\n  b\n"),
        ("a\n  b\n c", "a\n  b\n "),
        ("a\n  b\n\t\tc\n  ", "a\n  b\n\t\tc\n  "),
        ("a\n\n  b", "a\n"),
    ],
)
async def test_the_answer_ends_before_a_line_that_is_not_indented(
    make_client: MakeClient, text: str, content: str, is_streamed: bool
) -> None:
    def next_token(context: list[int], seed: Any) -> int:
        return text.encode()[len(context) - 7]

    client = await make_client(next_token=next_token)
    body = {**BODY, "n_indent": 2, "n_predict": len(text)}

    if is_streamed:
        *chunks, last = await stream(client, body)
        told = "".join(chunk["content"] for chunk in chunks)
    else:
        _, last = await client.post("/infill", body)
        told = last["content"]

    assert told == content
    assert last["stop_type"] == "limit"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_nothing_is_computed_behind_a_line_that_is_not_indented(
    make_client: MakeClient, is_streamed: bool
) -> None:
    num_drawn = 0

    def next_token(context: list[int], seed: Any) -> int:
        nonlocal num_drawn
        num_drawn += 1
        return b"a\n  b\ncd"[min(len(context) - 7, 7)]

    client = await make_client(next_token=next_token)
    body = {**BODY, "n_indent": 2, "n_predict": 1000}

    last = (await stream(client, body))[-1] if is_streamed else (await client.post("/infill", body))[1]

    assert last["stop_type"] == "limit"
    assert last["tokens_predicted"] <= num_drawn < 100


async def test_a_late_answer_ends_with_its_line(make_client: MakeClient) -> None:
    def next_token(context: list[int], seed: Any) -> int:
        time.sleep(0.002)  # the step's own thread
        return b"a\n"[len(context) % 2]

    client = await make_client(next_token=next_token)

    status, answer = await client.post("/infill", {**BODY, "n_predict": 2000, "t_max_predict_ms": 20})

    assert status == 200, answer
    assert answer["content"].startswith("\na") or answer["content"].startswith("a\n")
    assert answer["stop_type"] == "limit"
    assert answer["tokens_predicted"] < 2000


async def test_an_answer_that_its_indent_ends_is_kept_for_a_retry(make_client: MakeClient) -> None:
    text = "a\n  b\nc\nd\ne\n"
    client = await make_client(next_token=lambda context, seed: text.encode()[len(context) - 7])
    body = {**BODY, "n_indent": 2, "n_predict": len(text)}

    answers = [await client.post("/infill", body, **{"Idempotency-Key": "k"}) for _ in range(2)]

    assert answers[0] == answers[1]
    assert client.engine.stats.finished["abort"] == 1
