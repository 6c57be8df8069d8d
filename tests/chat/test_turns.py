"""Tools, calls, results, parts and reasoning reach a template in the form that it takes, or are put into words."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest

from brlite.chat.formats import Baichuan2Format, ChatFormat, ChatGLM2Format, ChatGLM3Format
from brlite.chat.template import ChatTemplate
from brlite.chat.turns import TemplateExtras, short_id
from brlite.errors import InvalidRequest
from tests.chat.conftest import compiled

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "call_0123456789", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
ASKED = {"role": "user", "content": "q"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_0123456789", "content": "r"}
TALK = [ASKED, CALLED, RESULT]

# Shapes of published templates.
QWEN = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{% endfor %}"
)
DEEPSEEK = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + '\\n' + c.function.arguments + '\\n' }}{% endfor %}"
    "{% endfor %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{{ m.content }}{% elif m.role == 'system' %}{{ m.content }}"
    "{% elif m.tool_calls is defined %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have 9 characters') }}{% endif %}[TOOL_CALLS]{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{{ c.id }}{% endfor %}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}"
    "{% endif %}[RESULT]{{ m.content }}{{ m.tool_call_id }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
GLM4 = (
    "{% for m in messages %}[{{ m.role }}]{% if m.tools is defined %}{% for t in m.tools %}{{ t | tojson }}{% endfor %}"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}\n"
    "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
IS_DEFINED = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.content is defined %}{{ m.role }}="
    "{{ m.content }};{% else %}{% for c in m.tool_calls %}{{ c | tojson }};{% endfor %}{% endif %}{% endfor %}"
)
CHATML = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def render(template: str, messages: list[dict[str, Any]], **extras: Any) -> str:
    return compiled(template).render(messages, add_generation_prompt=False, extras=TemplateExtras(**extras))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            QWEN,
            f'<tools>{json.dumps(TOOL)}</tools>[user]q[assistant]<tool_call>{{"name": "f", "arguments": {{"a": 1}}}}'
            "</tool_call>[tool]r",
        ),
        (DEEPSEEK, f'[{json.dumps(TOOL)}][user]q[assistant]f\n{{"a": 1}}\n[tool]r'),
        (
            MISTRAL,
            f'[AVAILABLE_TOOLS][{json.dumps(TOOL)}][INST]q[TOOL_CALLS]f{{"a": 1}}{short_id("call_0123456789")}'
            f"[RESULT]r{short_id('call_0123456789')}",
        ),
        (GLM4, f'[system]{json.dumps(TOOL["function"])}[user]q[assistant]f\n{{"a": 1}}[tool]r'),
        (
            IS_DEFINED,
            f"[{json.dumps(TOOL)}]user=q;"
            + json.dumps({**CALL, "function": {"name": "f", "arguments": {"a": 1}}})
            + ";tool=r;",
        ),
    ],
)
def test_tools_calls_and_results_are_said_as_the_template_says_them(template: str, text: str) -> None:
    assert render(template, TALK, tools=[TOOL]) == text


# Shapes of templates that list tools but do not write calls (LFM2, Granite 3, SmolLM3), or not in jinja2's sandbox, or
# write results in no turn.
LISTED = (
    "{% if tools %}List of tools: [{{ tools[0] | tojson }}]{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
)
SMOLLM3 = (
    "{% if xml_tools %}<tools>{% for t in xml_tools %}{{ t | string }}{% endfor %}</tools> as <tool_call>{% endif %}"
    "{% for m in messages %}[{{ 'user' if m.role == 'tool' else m.role }}]{{ m.content }}{% endfor %}"
)
PHI4_MINI = (
    "{% for m in messages %}{% if m.role == 'system' and 'tools' in m and m.tools is not none %}"
    "{{ '<|system|>' + m.content + '<|tool|>' + m.tools + '<|/tool|><|end|>' }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
KIMI = (
    "{% set queue = namespace(ids=[]) %}{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% set _ = queue.ids.append(c.function.name) %}<|tool_calls_section_begin|>"
    "{{ c.function.name }}{% endfor %}{% endfor %}"
)
NO_RESULTS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages if m.role != 'tool' %}[{{ m.role }}]"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            LISTED,
            f"List of tools: [{json.dumps(TOOL)}]<|im_start|>user\nq<|im_end|><|im_start|>assistant\n"
            "<|tool_call_start|>[f(a=1)]<|tool_call_end|><|im_end|><|im_start|>tool\nr<|im_end|>",
        ),
        (
            SMOLLM3,
            f"<tools>{TOOL}</tools> as <tool_call>[user]q[assistant]<tool_call>\n"
            '{"name": "f", "arguments": {"a": 1}}\n</tool_call>[user]r',
        ),
        (
            PHI4_MINI,
            f"<|system|><|tool|>{json.dumps([TOOL['function']])}<|/tool|><|end|><|user|>q<|end|><|assistant|>"
            '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|><|end|><|tool|>r<|end|>',
        ),
        (
            KIMI,
            f"[{json.dumps(TOOL)}][user]q[assistant]<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
            '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|>[tool]r',
        ),
        (
            NO_RESULTS,
            f"[{json.dumps(TOOL)}][user]q[assistant]<tool_call>f[user]<tool_response>\nr\n</tool_response>",
        ),
    ],
)
def test_a_template_that_lists_tools_gets_only_what_it_does_not_write_as_text(template: str, text: str) -> None:
    assert render(template, TALK, tools=[TOOL]) == text


def test_a_variable_of_the_template_cannot_replace_the_requests_tools() -> None:
    with pytest.raises(InvalidRequest, match="must not set 'xml_tools'"):
        render(SMOLLM3, [ASKED], tools=[TOOL], variables={"xml_tools": []})


@pytest.mark.parametrize("content", [None, "", "absent"])
def test_an_assistant_turn_with_calls_may_have_no_content(content: str | None) -> None:
    turn = {key: value for key, value in CALLED.items() if key != "content"}
    if content != "absent":
        turn["content"] = content

    assert (
        render(QWEN, [ASKED, turn]) == '[user]q[assistant]<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    )


def test_a_template_that_knows_no_tools_gets_them_in_words() -> None:
    text = render(CHATML, [{"role": "system", "content": "Be short."}, *TALK], tools=[TOOL])

    assert text.startswith("[system]Be short.\n\n# Tools\n\n")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert text.endswith(
        '[user]q[assistant]<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
        "[user]<tool_response>\nr\n</tool_response>"
    )


def test_a_template_without_system_messages_gets_the_tools_in_the_users_words() -> None:
    text = render(NO_SYSTEM, [*TALK, {**RESULT, "content": "s"}, {"role": "user", "content": "and?"}], tools=[TOOL])

    assert text.startswith("[user]# Tools\n\n")
    assert "</tool_call>\n\nq[assistant]<tool_call>" in text
    assert text.endswith("[user]<tool_response>\nr\n</tool_response>\n<tool_response>\ns\n</tool_response>\nand?")


def test_the_words_for_tools_are_not_there_without_tools() -> None:
    assert render(CHATML, [ASKED]) == "[user]q"
    assert "# Tools" not in render(CHATML, TALK)


def test_arguments_that_are_no_json_go_as_they_are() -> None:
    cut = {**CALLED, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a'}}]}

    assert r'"arguments": "{\"a"' in render(QWEN, [ASKED, cut])


@pytest.mark.parametrize("template", [QWEN, DEEPSEEK, LISTED])
def test_arguments_may_be_given_as_an_object(template: str) -> None:
    called = {**CALLED, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"a": 1}}}]}

    assert render(template, [ASKED, called], tools=[TOOL]) == render(template, [ASKED, CALLED], tools=[TOOL])


def test_the_name_of_a_result_is_that_of_its_call() -> None:
    template = QWEN + "{% for m in messages if m.role == 'tool' %}{{ m.name }}{% endfor %}"

    assert render(template, TALK, tools=[TOOL]).endswith("[tool]rf")


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
LOOPS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}"
)
ONLY_PARTS = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}<{{ p.text }}>{% endif %}{% endfor %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "content", "text"),
    [
        (CHATML, PARTS, "[user]ab"),
        (LOOPS, PARTS, "<a><b>"),
        (LOOPS, "ab", "ab"),
        (ONLY_PARTS, "ab", "<ab>"),
        (ONLY_PARTS, PARTS, "<a><b>"),
    ],
)
def test_parts_are_one_string_unless_the_template_loops_over_them(template: str, content: Any, text: str) -> None:
    assert render(template, [{"role": "user", "content": content}]) == text


def test_a_part_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="a part of a message's content must be a text"):
        render(CHATML, [{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ m.content }}({{ m.reasoning_content }}){% endfor %}", "b(t)"),
        ("{% for m in messages %}{{ m.content }}({{ m['thinking'] }}){% endfor %}", "b(t)"),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", "b"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}", "<think>\nt\n</think>\n\nb"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "b"),
    ],
)
def test_reasoning_of_former_turns_goes_where_the_template_looks_for_it(template: str, text: str) -> None:
    assert render(template, [{"role": "assistant", "content": "b", "reasoning_content": "t"}]) == text


def test_variables_and_documents_reach_the_template() -> None:
    template = (
        "{{ enable_thinking is defined and enable_thinking }}{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    )

    assert render(template, [ASKED], variables={"enable_thinking": True}, documents=[{"text": "x"}]) == "Truex"


def test_functions_for_code_reach_smollm3_beside_its_tools() -> None:
    template = "{% for t in python_tools or [] %}<code>{{ t | string }}</code>{% endfor %}" + SMOLLM3

    text = render(template, [ASKED], tools=[TOOL], variables={"python_tools": [{"name": "g"}]})

    assert text == f"<code>{{'name': 'g'}}</code><tools>{TOOL}</tools> as <tool_call>[user]q"


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "add_generation_prompt", "raise_exception"])
def test_variables_that_are_the_servers_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"chat_template_kwargs must not set '{name}'") as caught:
        render(CHATML, [ASKED], variables={name: []})

    assert caught.value.param == "chat_template_kwargs"


def test_documents_for_a_template_that_takes_none_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="does not take documents") as caught:
        render(CHATML, [ASKED], documents=[{"text": "x"}])

    assert caught.value.param == "documents"


def test_chatglm3_has_tools_in_its_system_message_and_calls_in_code() -> None:
    tokens = ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    chat_format = ChatGLM3Format({text: token_id for token_id, text in enumerate(tokens)})

    text = chat_format.render(TALK, add_generation_prompt=True, extras=TemplateExtras(tools=[TOOL]))

    listed = json.dumps([TOOL["function"]], indent=4)
    assert text == (
        f"[gMASK]sop<|system|>\n\n{listed}<|user|>\nq<|assistant|>f\n```python\ntool_call(a=1)\n```"
        "<|observation|>\nr<|assistant|>"
    )


def test_a_short_id_is_kept_and_a_long_one_is_shortened_alike_each_time() -> None:
    assert short_id("a1b2c3d4e") == "a1b2c3d4e"
    assert short_id("call_1") == short_id("call_1") != short_id("call_2")
    assert len(short_id("call_1")) == 9


ONLY_TWO_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}[u]{{ m.content }}{% elif m.role == 'assistant' %}[a]"
    "{{ m.content }}{% endif %}{% endfor %}{# developer #}"
)
FIRST_SYSTEM = "{{ messages[0].content }}{% for m in messages[1:] if m.role != 'system' %}{{ m.content }}{% endfor %}"
GLM_IDS = {text: number for number, text in enumerate(("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"))}
OWN_FORMATS: dict[str, ChatFormat] = {
    "baichuan2": Baichuan2Format(user_token_id=0, assistant_token_id=1, names={0: "<u>", 1: "<a>"}),
    "chatglm3": ChatGLM3Format({**GLM_IDS, "<|observation|>": 5}),
    "chatglm2": ChatGLM2Format(GLM_IDS),
}
ALL_TEMPLATES = {
    "qwen": QWEN,
    "deepseek": DEEPSEEK,
    "mistral": MISTRAL,
    "glm4": GLM4,
    "is defined": IS_DEFINED,
    "chatml": CHATML,
    "no system": NO_SYSTEM,
    "loops": LOOPS,
    "only parts": ONLY_PARTS,
    "only two roles": ONLY_TWO_ROLES,
    "first system": FIRST_SYSTEM,
}


@pytest.mark.parametrize("name", [*ALL_TEMPLATES, *OWN_FORMATS])
def test_each_turn_of_each_role_is_said_or_refused(name: str) -> None:
    chat_format = OWN_FORMATS.get(name) or ChatTemplate(ALL_TEMPLATES[name], source="here", special_tokens={})
    answer = {"role": "assistant", "content": "b"}

    for role in ("system", "developer", "user", "assistant", "tool", "function", "narrator"):
        turn = {"role": role, "content": "w0rd"}
        for chat in ([turn, ASKED], [ASKED, turn, ASKED], [ASKED, answer, turn, ASKED], [ASKED, answer, turn]):
            with suppress(InvalidRequest):
                assert "w0rd" in chat_format.render(chat, add_generation_prompt=True), (role, chat)
    assert "q" in chat_format.render([ASKED], add_generation_prompt=True)
    chat_format.close()


def test_a_developer_is_the_system_where_the_template_only_mentions_one() -> None:
    template = "{% for m in messages %}{% if m.role in ('system', 'user') %}[{{ m.role }}]{{ m.content }}{% endif %}"
    developer = {"role": "developer", "content": "d"}

    assert render(template + "{% endfor %}{# developer #}", [developer, ASKED]) == "[system]d[user]q"
    assert render("{# developer #}" + CHATML, [developer, ASKED]) == "[developer]d[user]q"


def test_a_role_that_the_template_leaves_out_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="leaves out messages of the role narrator"):
        render(ONLY_TWO_ROLES, [ASKED, {"role": "narrator", "content": "x"}])


def test_a_system_message_that_the_template_takes_at_the_beginning_only_is_refused_behind_it() -> None:
    system = {"role": "system", "content": "x"}

    assert render(FIRST_SYSTEM, [system, ASKED]) == "xq"
    with pytest.raises(InvalidRequest, match="leaves out a system message that is not the first"):
        render(FIRST_SYSTEM, [system, ASKED, system, ASKED])
