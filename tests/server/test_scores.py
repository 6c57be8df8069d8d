"""Rerank and score as clients see them, on a fake model whose hidden states are known."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from array import array
from typing import Any

import aiohttp
import pytest

from brlite.config.options import KeyConfig
from brlite.engine.scoring import ScoringHead
from tests.conftest import Eventually
from tests.fakes import HIDDEN_SIZE, hidden_state
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient, chat_body

WEIGHT = [0.5**index * (-1) ** index / 64 for index in range(HIDDEN_SIZE)]


@pytest.fixture
async def scorer(make_client: MakeClient) -> Client:
    return await make_client(scoring_head=ScoringHead(array("f", WEIGHT)))


def logit(text: str) -> float:
    return sum(weight * value for weight, value in zip(WEIGHT, hidden_state(text.encode()), strict=True))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def rerank_body(documents: Any = ("one", "two", "three"), **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "query": "which? ", "documents": documents, **fields}


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank", "/reranking"])
async def test_documents_come_back_the_most_relevant_first(scorer: Client, path: str) -> None:
    documents = ["one", {"text": "two"}, "three"]

    status, answer = await scorer.post(path, rerank_body(documents))

    texts = ["one", "two", "three"]
    scores = [sigmoid(logit("which? " + text)) for text in texts]
    order = sorted(range(3), key=lambda index: -scores[index])
    assert status == 200, answer
    assert answer["id"].startswith("rerank-")
    assert [(item["index"], item["document"]["text"]) for item in answer["results"]] == [
        (index, texts[index]) for index in order
    ]
    assert [item["relevance_score"] for item in answer["results"]] == pytest.approx([scores[i] for i in order])
    assert len(set(scores)) == 3
    num_tokens = 3 * 7 + 3 + 3 + 5
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"]) == (num_tokens, num_tokens)


async def test_top_n_without_documents_is_short(scorer: Client) -> None:
    _, whole = await scorer.post("/v1/rerank", rerank_body())

    _, short = await scorer.post("/v1/rerank", rerank_body(top_n=2.0, return_documents=False))
    _, more = await scorer.post("/v1/rerank", rerank_body(top_n=10**400))

    assert short["results"] == [
        {key: item[key] for key in ("index", "relevance_score")} for item in whole["results"][:2]
    ]
    assert more["results"] == whole["results"]


@pytest.mark.parametrize("is_raw", [False, True])
@pytest.mark.parametrize("has_text", [False, True])
async def test_texts_give_a_bare_list_as_with_tei(scorer: Client, is_raw: bool, has_text: bool) -> None:
    texts = ["one", "two", "three"]
    body = {"query": "which? ", "texts": texts, "raw_scores": is_raw, "return_text": has_text, "truncate": False}

    status, answer = await scorer.post("/rerank", body)

    scores = [logit("which? " + text) if is_raw else sigmoid(logit("which? " + text)) for text in texts]
    order = sorted(range(3), key=lambda index: -scores[index])
    assert status == 200, answer
    assert [item["index"] for item in answer] == order
    assert [item["score"] for item in answer] == pytest.approx([scores[index] for index in order])
    assert [item.get("text") for item in answer] == [texts[index] if has_text else None for index in order]
    assert all(len(item) == 2 + has_text for item in answer)


@pytest.mark.parametrize(
    ("direction", "kept"), [("Right", "a" * 60 + "bcde"), ("left", "a" * 58 + "bcdefg"), (None, None)]
)
async def test_a_long_text_is_cut_from_teis_direction(scorer: Client, direction: str | None, kept: str | None) -> None:
    body: dict[str, Any] = {"query": "a" * 60, "texts": ["bcdefg"], "raw_scores": True}
    if direction is not None:
        body |= {"truncate": True, "truncation_direction": direction}

    status, answer = await scorer.post("/rerank", body)

    if kept is None:
        assert (status, answer["error"]["param"]) == (400, "texts[0]")
    else:
        assert [item["score"] for item in answer] == pytest.approx([logit(kept)])


async def test_equal_scores_keep_their_order(scorer: Client) -> None:
    _, answer = await scorer.post("/v1/rerank", rerank_body(["same"] * 4))

    assert [item["index"] for item in answer["results"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize(
    ("text_1", "text_2", "pairs"),
    [
        ("ab", "cd", ["abcd"]),
        ("ab", ["cd", "e"], ["abcd", "abe"]),
        (["ab", "x"], ["cd", "e"], ["abcd", "xe"]),
        (["ab"], ["cd", "e"], ["abcd", "abe"]),
    ],
    ids=["text and text", "text and texts", "pairs", "a list of one"],
)
async def test_texts_are_scored_in_their_order(
    scorer: Client, path: str, text_1: Any, text_2: Any, pairs: list[str]
) -> None:
    status, answer = await scorer.post(path, {"text_1": text_1, "text_2": text_2})

    assert status == 200, answer
    assert (answer["object"], answer["model"]) == ("list", "fake")
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("score", i) for i in range(len(pairs))]
    assert [item["score"] for item in answer["data"]] == pytest.approx([sigmoid(logit(pair)) for pair in pairs])


@pytest.mark.parametrize("has_sigmoid", [True, False])
async def test_a_request_may_ask_for_the_heads_own_number(make_client: MakeClient, has_sigmoid: bool) -> None:
    client = await make_client(scoring_head=ScoringHead(array("f", WEIGHT), has_sigmoid))
    texts = {"text_1": "ab", "text_2": "cd"}

    found = [
        (await client.post("/v1/score", {**texts, "use_activation": wish}))[1]["data"][0]["score"]
        for wish in (None, True, False)
    ]

    raw, mapped = logit("abcd"), sigmoid(logit("abcd"))
    assert found == pytest.approx([mapped if has_sigmoid else raw, mapped, raw])


async def test_a_head_of_great_numbers_gives_0_and_1(make_client: MakeClient) -> None:
    client = await make_client(scoring_head=ScoringHead(array("f", [-1e30] + [0.0] * (HIDDEN_SIZE - 1))))
    texts = [chr(97 + number) for number in range(20)]

    _, answer = await client.post("/v1/score", {"text_1": "ab", "text_2": texts})

    expected = [float(hidden_state(f"ab{text}".encode())[0] < 0) for text in texts]
    assert [item["score"] for item in answer["data"]] == pytest.approx(expected)
    assert set(expected) == {0.0, 1.0}


async def test_a_longer_pair_is_cut_as_told_and_the_answer_says_so(scorer: Client) -> None:
    status, right = await scorer.post("/v1/rerank", rerank_body(["x" * 10**5, "y"], truncate_prompt_tokens=10))
    _, left = await scorer.post(
        "/v1/score", {"text_1": "q" * 99, "text_2": "abc", "truncate_prompt_tokens": 5, "truncation_side": "left"}
    )
    refused, answer = await scorer.post("/v1/rerank", rerank_body(["y", "x" * 60]))

    scores = {item["index"]: item["relevance_score"] for item in right["results"]}
    assert (status, right["usage"]["prompt_tokens"]) == (200, 18)
    assert right["warnings"] == ["the pair of documents[0] was cut to 10 tokens by truncate_prompt_tokens"]
    assert scores[0] == pytest.approx(sigmoid(logit("which? xxx")))
    assert left["data"][0]["score"] == pytest.approx(sigmoid(logit("qqabc")))
    assert (refused, answer["error"]["param"]) == (400, "documents[1]")
    assert "the prompt has 67 tokens" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        ("/v1/rerank", {"query": "a"}, "documents", "Missing required parameter"),
        ("/v1/rerank", {"documents": ["a"]}, "query", "Missing required parameter"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents", "at least 1"),
        ("/v1/rerank", {"query": "a", "documents": "b"}, "documents", "Expected"),
        ("/v1/rerank", {"query": "a", "documents": ["b", 7]}, "documents[1]", "Expected"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "b"}]}, "documents[0].text", "Missing"),
        ("/v1/rerank", {"query": ["a"], "documents": ["b"]}, "query", "Expected"),
        ("/v1/rerank", {"query": "a", "documents": ["b"] * 3000}, "documents", "at most 2048"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n", "at least 0"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 1.5}, "top_n", "whole number"),
        ("/v1/rerank", {"query": "a" * 65, "documents": ["b"]}, "query", "65 tokens"),
        ("/v1/rerank", {"query": "", "documents": ["b", ""]}, "documents[1]", "at least one token"),
        ("/v1/rerank", {"query": "\ud800", "documents": ["b"]}, None, ""),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", ""),
        ("/rerank", {"query": "a", "documents": ["b"], "raw_scores": True}, "raw_scores", "needs texts"),
        ("/rerank", {"query": "a", "texts": ["b"], "documents": ["b"]}, "documents", "cannot be given with texts"),
        ("/rerank", {"query": "a", "texts": ["b"], "priority": 1}, "priority", "cannot be given with texts"),
        ("/rerank", {"query": "a", "texts": ["b"], "frob": 1}, "frob", "cannot be given with texts"),
        ("/rerank", {"query": "a", "texts": []}, "texts", "at least 1"),
        ("/rerank", {"query": "a", "texts": ["b", 7]}, "texts[1]", "Expected"),
        ("/rerank", {"query": "a", "texts": ["b"], "truncation_direction": "up"}, "truncation_direction", "Right"),
        ("/v1/score", {"text_1": "a"}, "text_2", "Missing required parameter"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"] * 3}, "text_1", r"as many as text_2 has (3), got 2"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2", "at least 1"),
        ("/v1/score", {"text_1": [], "text_2": ["a"]}, "text_1", "at least 1"),
        ("/v1/score", {"text_1": "a", "text_2": [["a"]]}, "text_2[0]", "Expected"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "use_activation": 1}, "use_activation", "Expected"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "softmax": False}, "softmax", "use_activation"),
    ],
)
async def test_what_is_wrong_is_named_and_nothing_runs(
    scorer: Client, path: str, fields: dict[str, Any], param: str | None, words: str
) -> None:
    status, answer = await scorer.post(path, json.dumps({"model": "fake", **fields}).encode())

    assert (status, answer["error"]["param"]) == (400, param or answer["error"]["param"])
    assert words in answer["error"]["message"]
    assert not scorer.backend.batches


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
async def test_a_model_without_a_head_says_so(client: Client, path: str) -> None:
    status, answer = await client.post(path, rerank_body())
    score_status, score_answer = await client.post("/v1/score", {"text_1": "a", "text_2": "b"})

    assert (status, answer["error"]["code"]) == (400, "no_scoring_head")
    assert (score_status, score_answer["error"]["code"]) == (400, "no_scoring_head")
    assert "the model fake has no scoring head" in answer["error"]["message"]


async def test_a_key_is_charged_for_the_pairs(make_client: MakeClient) -> None:
    client = await make_client(
        config={"key": (KeyConfig(name="team", key="sk-1", tokens_per_minute=5),)},
        scoring_head=ScoringHead(array("f", WEIGHT)),
    )
    headers = {"Authorization": "Bearer sk-1"}

    refused, _ = await client.post("/v1/rerank", rerank_body(["x" * 65]), **headers)
    first, _ = await client.post("/v1/rerank", rerank_body(), **headers)
    second, answer = await client.post("/v1/score", {"text_1": "a", "text_2": "b"}, **headers)

    assert (refused, first, second) == (400, 200, 429)
    assert answer["error"]["code"] == "rate_limit_exceeded"


async def test_a_stream_beside_scores_is_as_it_is_alone(make_client: MakeClient) -> None:
    client = await make_client(scoring_head=ScoringHead(array("f", WEIGHT)))
    alone = await client.stream("/v1/chat/completions", chat_body(max_tokens=12))

    beside, (status, _) = await asyncio.gather(
        client.stream("/v1/chat/completions", chat_body(max_tokens=12)),
        client.post("/v1/rerank", rerank_body([f"document {number}" for number in range(60)])),
    )

    assert status == 200
    assert [event["choices"] for event in beside] == [event["choices"] for event in alone]


async def test_a_client_that_leaves_aborts_all_its_pairs(scorer: Client, eventually: Eventually) -> None:
    scorer.backend.gate = threading.Event()
    asking = asyncio.create_task(
        scorer.session.post(
            scorer.url + "/v1/rerank",
            json=rerank_body([str(number) for number in range(100)]),
            timeout=aiohttp.ClientTimeout(total=None),
        )
    )
    await eventually(scorer.backend.has_begun.is_set)
    asking.cancel()
    await asyncio.wait([asking], timeout=PATIENCE_SECONDS)
    await eventually(lambda: all(state.is_aborted for state in scorer.engine._engine._requests.values()))
    scorer.backend.gate.set()
    await scorer.engine.wait_idle()

    assert len(scorer.backend.batches) == 1
    assert scorer.engine.stats.num_used_blocks == 0


@pytest.mark.parametrize(("first", "second"), [("queries", "documents"), ("queries", "items"), ("data_1", "data_2")])
async def test_vllms_other_names_of_texts_are_taken(scorer: Client, first: str, second: str) -> None:
    _, usual = await scorer.post("/v1/score", {"text_1": "ab", "text_2": ["cd", "e"]})

    status, answer = await scorer.post("/v1/score", {first: "ab", second: ["cd", "e"]})
    _, long = await scorer.post("/v1/score", {first: "ab", second: ["cd", "x" * 70]})
    _, both = await scorer.post("/v1/score", {first: "ab", second: "cd", "text_2": "cd"})

    assert (status, answer["data"], "warnings" in answer) == (200, usual["data"], False)
    assert long["error"]["param"] == f"{second}[1]"
    assert (both["error"]["param"], "another name of text_2" in both["error"]["message"]) == (second, True)


async def test_a_top_n_of_0_keeps_all_documents_as_with_vllm(scorer: Client) -> None:
    _, whole = await scorer.post("/v1/rerank", rerank_body())

    _, answer = await scorer.post("/v1/rerank", rerank_body(top_n=0))

    assert answer["results"] == whole["results"]


class PairOfBytes:
    """A template of one token a byte: the instruction, the query, the document and "."."""

    takes_instruction = True

    def head(self, query: str, instruction: str | None = None) -> str:
        return f"{'Rank' if instruction is None else instruction}:{query}|"

    def tail(self) -> str:
        return "."

    def fill(self, query: str, document: str, instruction: str | None = None) -> str:
        return f"{self.head(query, instruction)}{document}."


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/score"])
@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "Find"},
        {"instruct": "Find"},
        {"chat_template_kwargs": {"instruction": "Find"}},
        {"chat_template_kwargs": {"instruct": "Find"}, "instruction": "Find"},
    ],
    ids=["vLLM", "SGLang", "vLLM's template", "twice the same"],
)
async def test_a_request_may_bring_an_instruction(make_client: MakeClient, path: str, fields: dict[str, Any]) -> None:
    client = await make_client(scoring_head=ScoringHead(array("f", WEIGHT), template=PairOfBytes()))
    texts = {"query": "q", "documents": ["d"]} if path == "/v1/rerank" else {"text_1": "q", "text_2": "d"}

    (_, plain), (status, answer) = await client.post(path, texts), await client.post(path, {**texts, **fields})

    scores = [(each.get("results") or each["data"])[0] for each in (plain, answer)]
    found = [each.get("relevance_score", each.get("score")) for each in scores]
    assert status == 200, answer
    assert found == pytest.approx([sigmoid(logit("Rank:q|d.")), sigmoid(logit("Find:q|d."))])
    assert "warnings" not in answer


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"instruction": 1}, "instruction", "Expected"),
        ({"chat_template_kwargs": {"instruction": ["a"]}}, "chat_template_kwargs.instruction", "must be a string"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "Expected"),
        ({"instruction": "a", "instruct": "b"}, "instruct", "differs from instruction"),
        ({"instruction": "x" * 70}, "instruction", "maximum context length is 64"),
    ],
)
async def test_a_wrong_instruction_is_named(
    make_client: MakeClient, fields: dict[str, Any], param: str, words: str
) -> None:
    client = await make_client(scoring_head=ScoringHead(array("f", WEIGHT), template=PairOfBytes()))

    status, answer = await client.post("/v1/rerank", rerank_body(**fields))

    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]


async def test_an_instruction_without_a_place_is_refused_and_other_variables_are_a_warning(scorer: Client) -> None:
    refused, answer = await scorer.post("/v1/rerank", rerank_body(instruct="Find"))
    body = rerank_body(chat_template_kwargs={"enable_thinking": False})
    status, warned = await scorer.post("/v1/rerank", body)
    strict = await scorer.post("/v1/rerank", {**body, "strict": True})

    assert (refused, answer["error"]["param"]) == (400, "instruction")
    assert "the prompt of a pair has no place for it" in answer["error"]["message"]
    assert (status, warned["warnings"]) == (
        200,
        ["chat_template_kwargs: only instruction has an effect at this endpoint"],
    )
    assert (strict[0], strict[1]["error"]["code"]) == (400, "strict")
