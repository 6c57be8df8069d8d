"""What a request would come to: `/explain`, vLLM's `render` and llama.cpp's `/apply-template`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from brlite.config.options import KeyConfig, KeysConfig, ServerConfig
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient, chat_body, completion_body


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/completions/render", "/explain"])
@pytest.mark.parametrize("fields", [{"frob": 1}, {"max_tokens": 1000}], ids=["a field", "a clamp"])
async def test_a_strict_call_is_refused_alike_where_it_is_only_shown(
    make_client: MakeClient, path: str, fields: dict[str, Any]
) -> None:
    lenient, strict = await make_client(), await make_client(config={"server": ServerConfig(strict=True)})

    warned, _ = await lenient.post(path, chat_body(**fields))
    refusals = [
        await lenient.post(path, chat_body(**fields, strict=True)),
        await strict.post(path, chat_body(**fields)),
    ]

    assert warned == 200
    assert [status for status, _ in refusals] == [400, 400]
    assert all("strict is set" in answer["error"]["message"] for _, answer in refusals)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses/input_tokens", {"input": "hi"}),
    ],
)
async def test_a_strict_call_is_refused_where_its_tokens_are_only_counted(
    make_client: MakeClient, path: str, body: dict[str, Any]
) -> None:
    lenient, strict = await make_client(), await make_client(config={"server": ServerConfig(strict=True)})

    counted, _ = await lenient.post(path, {**body, "frob": 1})
    refusals = [
        await lenient.post(path, {**body, "frob": 1, "strict": True}),
        await strict.post(path, body | {"frob": 1}),
    ]

    assert counted == 200
    assert [status for status, _ in refusals] == [400, 400]


async def test_the_prompt_is_shown_as_text_and_as_tokens(client: Client) -> None:
    _, explained = await client.post("/explain", chat_body("hi"))

    (prompt,) = explained["prompts"]
    assert (explained["endpoint"], explained["model"]) == ("/v1/chat/completions", "fake")
    assert prompt == {"text": "user:hi\n", "num_tokens": 8, "token_ids": list(b"user:hi\n")}
    answer = await client.chat("hi")
    assert answer["usage"]["prompt_tokens"] == prompt["num_tokens"]


async def test_each_parameter_says_where_its_value_is_from(client: Client) -> None:
    body = {"prompt": "hi", "top_p": 0.5, "max_tokens": 1000, "stop_tokens_ids": [5]}

    _, explained = await client.post("/explain", body)

    parameters = explained["parameters"]
    assert parameters["top_p"] == {"value": 0.5, "from": "request"}
    assert parameters["top_k"] == {"value": -1, "from": "default"}
    assert parameters["stop_token_ids"] == {"value": [5], "from": "request"}
    assert (parameters["max_tokens"]["value"], parameters["max_tokens"]["from"]) == (32, "server")
    assert "half of build_seq" in parameters["max_tokens"]["why"]
    assert explained["warnings"] == [parameters["max_tokens"]["why"]]
    assert parameters["seed"]["value"] is None


async def test_a_value_that_is_the_default_but_was_given_is_from_the_request(client: Client) -> None:
    _, explained = await client.post("/explain", {"messages": chat_body()["messages"], "max_completion_tokens": 5})
    _, others = await client.post("/explain", {"input": "hi", "temperature": 1})

    assert explained["parameters"]["max_tokens"] == {"value": 5, "from": "request"}
    assert others["endpoint"] == "/v1/responses"
    assert others["parameters"]["temperature"] == {"value": 1.0, "from": "request"}


async def test_a_models_own_default_is_from_its_generation_config(make_client: MakeClient) -> None:
    client = await make_client(sampling_defaults={"temperature": 0.25, "top_k": 7})

    _, explained = await client.post("/explain", {"prompt": "hi", "top_k": 9})
    _, rendered = await client.post("/v1/completions/render", {"prompt": "hi"})
    _, props = await client.get("/props")

    assert explained["parameters"]["temperature"] == {"value": 0.25, "from": "generation_config"}
    assert explained["parameters"]["top_k"] == {"value": 9, "from": "request"}
    assert rendered[0]["sampling_params"]["temperature"] == 0.25
    assert props["default_generation_settings"]["params"]["top_k"] == 7


async def test_a_beam_search_has_its_beams_in_the_forecast_and_no_default_of_the_model(make_client: MakeClient) -> None:
    client = await make_client(sampling_defaults={"top_p": 0.5})
    body = {**completion_body("hello", max_tokens=4), "use_beam_search": True, "best_of": 3}

    status, explained = await client.post("/explain", body)

    assert status == 200
    assert explained["parameters"]["top_p"] == {"value": 1.0, "from": "default"}
    assert explained["queue"]["num_new"] == 3


async def test_the_forecast_is_what_the_request_then_takes(client: Client) -> None:
    body = completion_body("hello", n=2, max_tokens=7)

    _, before = await client.post("/explain", body)
    await client.complete("hello", n=2, max_tokens=7)
    _, after = await client.post("/explain", body)

    # 5 tokens of the prompt fill one block of 4, which both share; 12 tokens fill three.
    assert (before["memory"]["num_needed_blocks"], before["memory"]["fits_now"]) == (5, True)
    assert (before["queue"]["num_new"], before["queue"]["starts_at_once"]) == (2, True)
    assert before["queue"]["prefill_seconds"] is None
    assert after["queue"]["prefill_seconds"] > 0
    assert after["queue"]["longest_decode_seconds"] > 0


async def test_a_request_that_would_be_refused_is_refused_in_the_same_words(client: Client) -> None:
    for body in (completion_body("x" * 100), completion_body(top_k=5000), completion_body(n=1000)):
        assert await client.post("/explain", body) == await client.post("/v1/completions", body)
    status, answer = await client.post("/explain?endpoint=/x", completion_body())
    assert (status, answer["error"]["param"]) == (400, "endpoint")


async def test_of_a_cut_prompt_the_rest_is_shown(client: Client) -> None:
    body = completion_body("hello", truncate_prompt_tokens=2)

    _, explained = await client.post("/explain", body)
    _, rendered = await client.post("/v1/completions/render", body)

    assert explained["prompts"] == [{"text": "lo", "num_tokens": 2, "token_ids": list(b"lo")}]
    assert (rendered[0]["prompt"], rendered[0]["token_ids"]) == ("lo", list(b"lo"))
    assert "was cut to 2" in explained["warnings"][0]


async def test_the_body_of_a_message_is_explained_where_the_query_says_so(client: Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "stop_sequences": ["x"]}

    _, explained = await client.post("/explain?endpoint=/v1/messages", body)

    assert explained["endpoint"] == "/v1/messages"
    assert explained["parameters"]["stop"] == {"value": ["x"], "from": "request"}


async def test_nothing_is_computed(client: Client) -> None:
    await client.post("/explain", chat_body())
    await client.post("/v1/chat/completions/render", chat_body())

    assert client.backend.batches == []


async def test_a_chat_is_rendered_as_the_engine_gets_it(client: Client) -> None:
    _, chat = await client.post("/v1/chat/completions/render", chat_body("hi", max_tokens=5, stream=True))
    _, completions = await client.post("/v1/completions/render", completion_body(["a", "b"], n=2))

    assert (chat["prompt"], chat["token_ids"], chat["stream"]) == ("user:hi\n", list(b"user:hi\n"), True)
    assert (chat["sampling_params"]["max_tokens"], chat["sampling_params"]["temperature"]) == (5, 0)
    assert chat["request_id"].startswith("chatcmpl-")
    assert [(each["prompt"], each["token_ids"]) for each in completions] == [("a", [97]), ("b", [98])]


async def test_a_template_is_applied_to_a_chat_longer_than_the_context(client: Client) -> None:
    for path in ("/apply-template", "/v1/apply-template/"):
        status, answer = await client.post(path, {"messages": [{"role": "user", "content": "x" * 100}]})

        assert (status, answer) == (200, {"prompt": f"user:{'x' * 100}\n"})


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"content": "né"}, list("né".encode())),
        ({"content": "a", "with_pieces": True}, [{"id": 97, "piece": "a"}]),
        (
            {"content": "é", "with_pieces": True, "parse_special": True, "add_special": True},
            [{"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}],
        ),
        ({"content": "x" * 100}, [120] * 100),
    ],
)
async def test_texts_are_tokenized_in_llama_cpps_words(client: Client, body: dict[str, Any], tokens: list[Any]) -> None:
    status, answer = await client.post("/tokenize", body)

    assert (status, answer["tokens"]) == (200, tokens)


async def test_detokenized_text_has_both_names(client: Client) -> None:
    _, answer = await client.post("/detokenize", {"tokens": list(b"hi")})

    assert answer == {"prompt": "hi", "content": "hi"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"content": "a", "prompt": "b"}, "prompt"),
        ({"prompt": "a", "with_pieces": True}, "with_pieces"),
        ({"content": "a", "tools": [{}]}, "tools[0].type"),
        ({"content": "a", "parse_special": False}, "parse_special"),
    ],
)
async def test_what_does_not_go_together_is_refused(client: Client, body: dict[str, Any], param: str) -> None:
    status, answer = await client.post("/tokenize", body)

    assert (status, answer["error"]["param"]) == (400, param)


async def test_small_endpoints_of_other_servers_answer(client: Client) -> None:
    _, props = await client.get("/props")
    _, load = await client.get("/load")

    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (4, 64)
    assert (props["model_alias"], props["eos_token"], props["modalities"]["vision"]) == ("fake", "<256>", False)
    assert load == {"server_load": 0}
    for method in ("get", "post"):
        async with client.session.request(method, client.url + "/ping") as response:
            assert (response.status, await response.read()) == (200, b"")


async def test_slots_tell_what_runs_in_llama_cpps_shape_and_not_what_it_says(
    client: Client, eventually: Callable[..., Awaitable[None]]
) -> None:
    _, idle = await client.get("/slots")
    client.backend.gate = threading.Event()
    request = asyncio.create_task(client.post("/v1/completions", completion_body(prompt="secret", max_tokens=8)))
    await eventually(lambda: client.engine.stats.num_running > 0)

    status, slots = await client.get("/slots?fail_on_no_slot=1")
    client.backend.gate.set()
    await asyncio.wait_for(request, PATIENCE_SECONDS)

    assert (status, len(slots), len(idle)) == (200, client.engine.info.max_num_seqs, len(slots))
    assert slots[0] == {
        "id": 0,
        "n_ctx": 64,
        "speculative": slots[0]["speculative"],
        "is_processing": True,
        "id_task": 0,
        "n_prompt_tokens": 6,
        "n_prompt_tokens_processed": 0,
        "n_prompt_tokens_cache": 0,
        "next_token": [{"has_next_token": True, "n_remain": 8, "n_decoded": 0}],
    }
    assert [(slot["id"], slot["is_processing"]) for slot in idle] == [(number, False) for number in range(len(idle))]


async def test_slots_that_are_all_taken_are_a_503_for_a_client_that_asks_for_it(
    make_client: MakeClient, eventually: Callable[..., Awaitable[None]]
) -> None:
    client = await make_client(max_num_seqs=1)
    client.backend.gate = threading.Event()
    request = asyncio.create_task(client.post("/v1/completions", completion_body()))
    await eventually(lambda: client.engine.stats.num_running > 0)

    status, answer = await client.get("/slots?fail_on_no_slot=1")
    client.backend.gate.set()
    await asyncio.wait_for(request, PATIENCE_SECONDS)

    assert (status, answer["error"]["code"]) == (503, "no_free_slot")


@pytest.mark.parametrize(
    ("config", "status", "code"),
    [
        ({"server": ServerConfig(slots=False)}, 404, "unsupported_endpoint"),
        ({"key": (KeyConfig(name="a", key="k"),)}, 403, "operator_key_required"),
        ({"key": (KeyConfig(name="a", key="k", admin=True),)}, 200, None),
        ({"keys": KeysConfig(keys=("k",))}, 200, None),
    ],
)
async def test_slots_are_an_operators_to_see_and_to_switch_off(
    make_client: MakeClient, config: dict[str, Any], status: int, code: str | None
) -> None:
    client = await make_client(config=config)

    async with client.session.get(client.url + "/slots", headers={"X-Api-Key": "k"}) as response:
        answer = await response.json()

    assert response.status == status
    assert code is None or answer["error"]["code"] == code


async def test_a_probe_needs_no_key_and_everything_else_does(make_client: MakeClient) -> None:
    client = await make_client(config={"keys": KeysConfig(keys=("secret",))})

    async with client.session.get(client.url + "/ping") as response:
        assert response.status == 200
    for path in ("/props", "/load", "/tokenizer_info"):
        assert (await client.get(path))[0] == 401
    for path in ("/explain", "/apply-template", "/v1/completions/render"):
        assert (await client.post(path, chat_body()))[0] == 401


@pytest.mark.parametrize("path", ["/props//", "//v1/load", "/ping/", "/v1/responses/resp_x/", "//responses//resp_x"])
async def test_new_paths_are_found_as_clients_spell_them(client: Client, path: str) -> None:
    async with client.session.get(client.url + path) as response:
        text = await response.text()

    assert response.status == 404 if "resp_x" in path else response.status == 200
    assert "unknown endpoint" not in text


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "*/*"])
async def test_the_body_alone_says_whether_a_response_is_streamed(client: Client, accept: str) -> None:
    for path, body in (
        ("/v1/chat/completions", chat_body()),
        ("/v1/completions", completion_body()),
        ("/v1/responses", {"input": "hi"}),
    ):
        for is_streamed in (False, True):
            answer = client.session.post(
                client.url + path, json={**body, "stream": is_streamed}, headers={"Accept": accept}
            )
            async with answer as response:
                kind = "text/event-stream" if is_streamed else "application/json"
                assert (response.status, response.content_type) == (200, kind)
