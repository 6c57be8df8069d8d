"""Texts of strangers that could make a regular expression run away: each is read under a bound of CPU time.

Read in linear time, each case takes a second at most. In quadratic or exponential time it takes minutes or longer.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.warm import WarmPython

CPU_SECONDS = 60
IMPORTS = r"""
import asyncio, resource, sys
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from brlite.chat.control_tokens import ControlToken, ControlTokens
from brlite.chat.template import ChatTemplate
from brlite.checkpoint.traced_code import class_text, parameter_list
from brlite.config.options import GrammarConfig
from brlite.dialects.errors import error_body
from brlite.errors import Unauthorized
from brlite.grammar.compiler import GrammarCompiler
from brlite.proxy.usage import estimate_prompt
from brlite.proxy.wire.heads import read_answer, read_request
from brlite.sampling_params import StructuredOutput
from brlite.server.handlers import ROUTES
from brlite.tokenizer.pre_tokenizers import ends_soon
from tests.grammar.answers import LongTokens

REQUEST, ANSWER, END = b"GET / HTTP/1.1\r\nHost: a", b"HTTP/1.1 200 OK\r\nA: a", b"b\r\n\r\n"
TEMPLATE = "{# " + "split('</think>' " * 100_000 + "#}"
TEKKEN = ControlTokens({text: ControlToken(0) for text in ("[INST]", "<s>", *(f"<SPECIAL_{n}>" for n in range(1000)))})

def compiled(grammar):
    tokenizer = LongTokens()
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, GrammarConfig()).compile(StructuredOutput(grammar=grammar))

def resolve(path):
    app = web.Application()
    app.add_routes(ROUTES)
    return asyncio.run(app.router.resolve(make_mocked_request("GET", path)))
"""
# What a client, an upstream, and the maker of a model send.
READS = {
    "a path of v1": "resolve('/' + 'v1//' * 4000 + 'x')",
    "an error for a path of slashes": "[error_body(Unauthorized(''), '/' * 16000 + 'messages.') for _ in range(1000)]",
    "a header of a request": "[read_request(REQUEST + b' ' * 16000 + END) for _ in range(1000)]",
    "a header of an answer": "[read_answer(ANSWER + b' ' * 65000 + END) for _ in range(100)]",
    "a body of almost base64": "[estimate_prompt(b'/v1/completions', (b'a' * 4095 + b' ') * 256) for _ in range(40)]",
    "a chat beside a thousand control tokens": "[list(TEKKEN.split('<' * 10**6)) for _ in range(10)]",
    "a template": "ChatTemplate(TEMPLATE, source='here', special_tokens={}).close()",
    "a grammar of line feeds": r"""compiled('root ::= "a"' + '\n' * 250_000)""",
    "a grammar of spaces and line feeds": r"""compiled('root ::= "a"\n' + ' \n' * 125_000 + 'b ::= "c"')""",
    "the code of a traced module": r"parameter_list('\n  __parameters__ = [' * 100_000)",
    "a traced class of line feeds": r"[class_text('class M(Module):\n' + '\n' * 10**6, 'M') for _ in range(10)]",
    "the expression of a tokenizer": r"ends_soon('[' + r'\p{L}' * 1000 + '(')",
}


@pytest.fixture(scope="module")
def python() -> Iterator[WarmPython]:
    python = WarmPython(IMPORTS)
    yield python
    python.close()


@pytest.mark.parametrize("name", READS)
def test_a_text_that_could_make_an_expression_run_away_is_read_in_linear_time(python: WarmPython, name: str) -> None:
    bound = f"resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))\n"

    read = python.run(bound + READS[name])

    assert read.returncode == 0, read.stderr[-2000:]
