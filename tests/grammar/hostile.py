"""Schemas and grammars that hung or killed servers, each sent to an engine while another request streams.

Run as a program: `python -m tests.grammar.hostile` prints a line of JSON for each, and bounds its own memory.
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import Iterator
from typing import Any

from brlite.config.options import EngineConfig, LimitsConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.engine import Engine
from brlite.errors import InvalidRequest
from brlite.sampling_params import SamplingParams, StructuredOutput
from tests.fakes import ByteTokenizer, FakeBackend

MAX_MEMORY = 4 * 1024**3
PROMPT = [97, 98]


def chain(num_links: int, *, is_bare: bool = False) -> dict[str, Any]:
    def link(number: int) -> dict[str, Any]:
        reference = {"$ref": f"#/$defs/d{number + 1}"}
        return reference if is_bare else {"type": "object", "properties": {"n": reference}, "required": ["n"]}

    return {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{i}": link(i) for i in range(num_links)} | {f"d{num_links}": {"type": "null"}},
    }


def properties(num: int, *, are_required: bool) -> dict[str, Any]:
    names = [f"property_{number}" for number in range(num)]
    return {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in names},
        "required": names if are_required else [],
    }


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "1,000 references in a row", {"json_schema": chain(1000)}
    yield "3,000 bare references in a row", {"json_schema": chain(3000, is_bare=True)}
    yield "4,000 optional properties", {"json_schema": properties(4000, are_required=False)}
    yield "500 optional properties", {"json_schema": properties(500, are_required=False)}
    yield "4,000 required properties", {"json_schema": properties(4000, are_required=True)}
    yield "5,000 required names", {"json_schema": {"type": "object", "required": [f"n{i}" for i in range(5000)]}}
    patterns = [{"pattern": f"a.{{{number}}}b"} for number in range(1, 21)]
    yield "20 patterns for one string", {"json_schema": {"type": "string", "allOf": patterns}}
    behind = {
        "$defs": {f"p{i}": {"allOf": [each, {"$ref": f"#/$defs/p{i + 1}"}]} for i, each in enumerate(patterns)}
        | {"p20": {}}
    }
    yield "20 patterns behind references", {"json_schema": {"$ref": "#/$defs/p0", **behind}}
    yield (
        "20 patterns, each the only alternative",
        {"json_schema": {"type": "string", "allOf": [{"anyOf": [each]} for each in patterns]}},
    )
    yield (
        "20 choices of two patterns",
        {"json_schema": {"type": "string", "allOf": [{"anyOf": [each, {"pattern": "c"}]} for each in patterns]}},
    )
    yield "a million repetitions", {"json_schema": {"type": "string", "pattern": "^a{1000000}$"}}
    yield "a remainder of ten million", {"json_schema": {"type": "integer", "multipleOf": 9999991}}
    remainders = [{"type": "integer", "multipleOf": number} for number in (4999, 4993)]
    yield "a product of remainders", {"json_schema": {"allOf": remainders}}
    divisors: dict[str, object] = {"multipleOf": 79}
    for number in (83, 89, 97):
        divisors = {"multipleOf": number, "anyOf": [divisors]}
    yield "divisors in nested alternatives", {"json_schema": {"type": "integer", **divisors}}
    apart = [{"type": "integer", "multipleOf": 480 + number} for number in range(19)]
    yield "remainders of alternatives", {"json_schema": {"oneOf": apart}}
    yield "nested repetitions", {"regex": "(a{1000}){1000}"}
    yield "20,000 values", {"json_schema": {"enum": [f"value number {i}" for i in range(20_000)]}}
    yield "1,200 long values", {"json_schema": {"enum": [f"{i}" + "x" * 400 for i in range(1200)]}}
    yield "30,000 choices", {"choice": [f"choice {i}" for i in range(30_000)]}
    yield "a long expression", {"regex": "ab" * 100_000}
    yield "a deep expression", {"regex": "(" * 5000 + "a" + ")" * 5000}
    yield (
        "rules that double",
        {"grammar": "root ::= R0\n" + "\n".join(f"R{i} ::= R{i + 1} R{i + 1}" for i in range(40)) + '\nR40 ::= "a"'},
    )
    yield (
        "5,000 rules in a row",
        {"grammar": "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1}' for i in range(5000)) + '\nr5000: "a"\n'},
    )
    yield (
        "5,000 GBNF rules in a row",
        {"grammar": "root ::= r0\n" + "\n".join(f'r{i} ::= "x" r{i + 1}' for i in range(5000)) + '\nr5000 ::= "a"'},
    )
    joint = "start: X\nX: " + " & ".join(f"A{i}" for i in range(25)) + "\n"
    yield "25 terminals at once", {"grammar": joint + "".join(f"A{i}: /.*a.{{{i}}}b.*/\n" for i in range(25))}
    yield "5,000 brackets", {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}
    yield "a long word that is no grammar", {"grammar": "a" * 100_000}
    yield "brackets that are never closed in a grammar", {"grammar": "root ::= " + "[" * 100_000}
    yield "quotes that are never closed in a grammar", {"grammar": "root ::= " + '"\\' * 50_000}
    yield "slashes that are never closed in a grammar", {"grammar": "start: " + "/a\\" * 40_000}
    yield "braces that are never closed in an expression", {"regex": "\\p{" * 80_000}
    yield "a million repetitions in a grammar", {"grammar": 'root ::= "a"{1,1000000}'}
    yield "10,000 levels of JSON", {"json_schema": nested(10_000)}
    yield "110 levels of JSON", {"json_schema": nested(110)}
    choice = {
        "anyOf": [{"type": "object", "properties": {f"k{i}": {"const": i}}, "required": [f"k{i}"]} for i in range(14)]
    }
    yield "a product of alternatives", {"json_schema": {"allOf": [choice, choice, choice, choice]}}
    yield "a loop of references", {"json_schema": {"$ref": "#"}}
    yield "a tree without leaves", {"json_schema": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}
    yield "endless whitespace expression", {"json_object": True, "whitespace_pattern": " {0,1000000}"}
    yield "a nested quantifier", {"regex": "((((a*)*)*)*)*b{10000}{10000}"}
    names = [f"n{number}" for number in range(5000)]
    yield (
        "names times a long schema",
        {"json_schema": {"propertyNames": {"enum": names}, "additionalProperties": {"description": "x" * 150_000}}},
    )
    same = {"$ref": "#/$defs/e"}
    yield (
        "a long enum in many alternatives",
        {"json_schema": {"$defs": {"e": {"enum": list(range(10_000))}}, "oneOf": [same] * 2000}},
    )
    tags = [f"p{number}" for number in range(20)]
    tagged = {"type": "object", "properties": {tag: {"const": 0} for tag in tags}, "required": tags}
    yield (
        "many tags in many alternatives",
        {"json_schema": {"oneOf": [{**tagged, "title": f"{i}"} for i in range(199)]}},
    )
    letters = [
        {"type": "array", "uniqueItems": True, "items": {"enum": [f"{i}{letter}" for letter in "abcdef"]}}
        for i in range(2000)
    ]
    yield "many unique items", {"json_schema": {"anyOf": [{**each, "maxItems": 3} for each in letters]}}
    unique = {"type": "array", "uniqueItems": True, "items": {"enum": list(range(20_000))}}
    yield "unique items of 20,000 values", {"json_schema": unique}
    yield "half a surrogate", {"json_schema": {"const": "\ud800"}}
    yield "half a surrogate in an expression", {"regex": "\ud800"}
    yield "half a surrogate in a choice", {"choice": ["\ud800"]}
    yield "half a surrogate in a grammar", {"grammar": 'root ::= "\ud800"'}
    yield "an infinite number in an annotation", {"json_schema": '{"type": "integer", "frob": 1e999}'}
    yield "an identifier that is no address", {"json_schema": {"$id": "http://[", "type": "integer"}}
    yield "a long name", {"json_schema": {"properties": {"x" * 100_000: {"not": {}}}}}
    yield "many subschemas", {"json_schema": {"anyOf": [{} for _ in range(60_000)]}}


async def stream(engine: EngineLoop, progress: list[int]) -> None:
    params = SamplingParams(max_tokens=100_000, temperature=0, ignore_eos=True)
    async for output in engine.generate(PROMPT, params):
        progress[0] += len(output.outputs[0].token_ids)
        await asyncio.sleep(0.001)


async def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    backend = FakeBackend(num_blocks=100_000, max_model_len=300_000, max_num_seqs=4)
    limits = LimitsConfig(max_waiting=1000, max_wait_seconds=1e6)
    async with EngineLoop(Engine(backend.info, ByteTokenizer(), EngineConfig(), limits), backend) as engine:
        await engine.compile(StructuredOutput(regex="a"))  # the library is there from now on
        progress = [0]
        streaming = asyncio.create_task(stream(engine, progress))
        for name, wish in cases():
            before, started = progress[0], time.process_time()
            error = ""
            try:
                await engine.compile(StructuredOutput(**wish))
            except InvalidRequest as refusal:
                error = str(refusal)
            seconds = time.process_time() - started
            while progress[0] == before:  # noqa: ASYNC110  # a stream that stands still is what is looked for
                await asyncio.sleep(0.001)
            print(json.dumps({"case": name, "error": error, "seconds": seconds}), flush=True)
        streaming.cancel()


if __name__ == "__main__":
    asyncio.run(main())
