"""`best_of` and beam search: the best answers, whole and in streams."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import MakeClient, chat_body, completion_body


@pytest.mark.parametrize("kind", ["completion", "chat"])
async def test_the_best_of_many_answers_are_told_best_first(make_client: MakeClient, kind: str) -> None:
    client = await make_client(logprob=lambda token_id: -token_id / 64)
    asked = {"temperature": 1, "seed": 5, "max_tokens": 4}
    ask: Any = client.complete if kind == "completion" else client.chat

    def text(choice: Any) -> str:
        return str(choice["text"] if kind == "completion" else choice["message"]["content"])

    def mean(choice: Any) -> float:
        told = choice["logprobs"]
        values = told["token_logprobs"] if kind == "completion" else [each["logprob"] for each in told["content"]]
        return sum(values) / len(values)

    logprobs = 0 if kind == "completion" else True
    all_of_them = await ask(**asked, n=6, logprobs=logprobs)
    best, shown = await ask(**asked, n=2, best_of=6), await ask(**asked, n=2, best_of=6, logprobs=logprobs)

    expected = sorted(all_of_them["choices"], key=mean, reverse=True)
    assert len({mean(choice) for choice in expected}) == 6
    assert [text(choice) for choice in best["choices"]] == [text(choice) for choice in expected[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert [choice["logprobs"] for choice in best["choices"]] == [None, None]
    assert [mean(choice) for choice in shown["choices"]] == [mean(choice) for choice in expected[:2]]
    assert best["usage"]["completion_tokens"] == all_of_them["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("kind", ["completion", "chat"])
async def test_a_beam_search_has_the_same_answers_whole_and_at_the_end_of_a_stream(
    make_client: MakeClient, kind: str
) -> None:
    client = await make_client(logprob=lambda token_id: -1 - token_id % 7, max_num_seqs=8)
    ask: Any = client.complete if kind == "completion" else client.chat
    asked = {"use_beam_search": True, "best_of": 5, "n": 2, "temperature": 0, "max_tokens": 6, "length_penalty": 0.5}

    whole = await ask(**asked)
    is_chat = kind == "chat"
    path, body = ("chat/completions", chat_body(**asked)) if is_chat else ("completions", completion_body(**asked))
    chunks = await client.stream(f"/v1/{path}", body)

    texts = [each["text"] if kind == "completion" else each["message"]["content"] for each in whole["choices"]]
    streamed = ["", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            text = choice["text"] if kind == "completion" else choice["delta"].get("content", "")
            streamed[choice["index"]] += text
    assert streamed == texts
    assert len(set(texts)) == 2
    assert whole["usage"]["completion_tokens"] == 12
    assert "warnings" not in whole


async def test_each_prompt_has_its_own_best_answers(make_client: MakeClient) -> None:
    client = await make_client(logprob=lambda token_id: -token_id / 64)
    asked = {"temperature": 1, "seed": 5, "best_of": 5, "n": 2}

    together = await client.complete(["ab", "cd"], **asked)
    alone = [await client.complete(prompt, **asked) for prompt in ("ab", "cd")]

    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for answer in alone for choice in answer["choices"]]
    assert [choice["text"] for choice in together["choices"]] == texts
