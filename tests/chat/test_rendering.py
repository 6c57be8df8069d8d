"""Templates render as transformers renders them, once a chat has the form that the template takes."""

from __future__ import annotations

from typing import Any

import pytest

from brlite.chat.template import ChatTemplate
from brlite.chat.turns import TemplateExtras
from tests.chat.conftest import compiled
from tests.chat.test_turns import CHATML, DEEPSEEK, IS_DEFINED, MISTRAL, QWEN, TOOL

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils", exc_type=ImportError)

# What published templates use beside plain loops: namespaces, slices, tests, filters, macros, loop controls, trimming.
RICH = """\
{%- macro text(content) %}{% if content is string %}{{ content }}
    {%- else %}{% for p in content %}{{ p.text }}{% endfor %}{% endif %}{% endmacro %}
{%- set ns = namespace(last=0, has_tool=false) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, messages = messages[0]['content'] | trim, messages[1:] %}
{%- endif %}
{%- for m in messages[::-1] %}
    {%- if m.role == 'user' and m.content is not mapping %}{% set ns.last = loop.index0 %}{% break %}{% endif %}
{%- endfor %}
  {% if tools is not none and tools %}
# Tools
{{ tools | tojson(indent=2) }}
{{ tools | map(attribute='function') | map(attribute='name') | join(', ') | upper }}
  {% endif %}
{{ bos_token }}{{ (system or 'none').replace('\\n', ' ') ~ '|' }}{{ enable_thinking | default(true) }}
{%- for m in messages %}
    {%- if m.role == 'tool' %}{% set ns.has_tool = true %}
<tool>{{ text(m.content) }}</tool>{% continue %}{% endif %}
<|{{ m['role'] }}|>{{ text(m.content) if m.content else '' }}
    {%- for c in m.tool_calls if m.tool_calls is defined %}
{{ loop.index ~ ':' ~ c.function.name }}
        {%- for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{{ ',' if not loop.last }}{% endfor %}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{{ ns.last }}{{ ns.has_tool }}{% endif %}"""

USER, SYSTEM = {"role": "user", "content": " Wie <spät> ist's? 水 "}, {"role": "system", "content": "Be\nbrief. "}
ANSWER = {"role": "assistant", "content": "Five & ten."}
RESULT = {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": '{"ok": "è"}'}


def called(content: str | None, arguments: Any) -> dict[str, Any]:
    call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


# As clients send them, and as transformers must be given them: null is "", arguments are an object, parts one string.
CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "one user": ([USER], [USER]),
    "a system message": ([SYSTEM, USER], [SYSTEM, USER]),
    "several turns": ([SYSTEM, USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER]),
    "a call without content": (
        [USER, called(None, '{"x": [1, "é"]}'), RESULT, ANSWER, USER],
        [USER, called("", {"x": [1, "é"]}), {**RESULT, "name": "f"}, ANSWER, USER],
    ),
    "arguments as an object": (
        [USER, called("Hm.", {"x": None}), RESULT],
        [USER, called("Hm.", {"x": None}), {**RESULT, "name": "f"}],
    ),
}
TEMPLATES = {"qwen": QWEN, "mistral": MISTRAL, "chatml": CHATML, "rich": RICH}


CASES = [
    (template, chat, has_tools)
    for template in TEMPLATES
    for chat, (sent, _) in CHATS.items()
    for has_tools in (False, True)
    if template != "chatml" or not (has_tools or any("tool_calls" in turn for turn in sent))  # it knows no tools
]


@pytest.mark.parametrize(("template", "chat", "has_tools"), CASES)
def test_a_chat_is_rendered_as_by_transformers(template: str, chat: str, has_tools: bool) -> None:
    sent, given = CHATS[chat]
    tools = [TOOL] if has_tools else []
    variables = {"enable_thinking": False}

    rendered = compiled(TEMPLATES[template]).render(
        sent, add_generation_prompt=True, extras=TemplateExtras(tools=tools, variables=variables)
    )

    (expected,), _ = chat_template_utils.render_jinja_template(
        [given],
        tools=tools or None,
        chat_template=TEMPLATES[template],
        add_generation_prompt=True,
        bos_token="<s>",
        **variables,
    )
    assert rendered == expected


@pytest.mark.parametrize(
    ("template", "given"),
    [
        (DEEPSEEK, called("", '{"x": 1}')),  # joins strings
        (IS_DEFINED, {key: value for key, value in called("", {"x": 1}).items() if key != "content"}),
    ],
)
def test_calls_have_the_form_that_the_template_takes(template: str, given: dict[str, Any]) -> None:
    rendered = compiled(template).render(
        [USER, called(None, '{"x": 1}')], add_generation_prompt=False, extras=TemplateExtras(tools=[TOOL])
    )

    (expected,), _ = chat_template_utils.render_jinja_template([[USER, given]], tools=[TOOL], chat_template=template)
    assert rendered == expected


CUTTING = """\
{%- for m in messages %}<|{{ m.role }}|>
    {%- if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1]STRIPPED }}
    {%- else %}{{ m.content }}{% endif %}
{%- endfor %}<|assistant|><think>"""


@pytest.mark.parametrize("stripped", ["", ".lstrip('\\n')"])
def test_the_answer_before_has_no_white_space_where_the_template_drops_its_reasoning(stripped: str) -> None:
    template = ChatTemplate(CUTTING.replace("STRIPPED", stripped), source="here", special_tokens={})
    turns = [USER, {**ANSWER, "reasoning_content": "Let me see."}, USER]

    with_reasoning = template.render(turns, add_generation_prompt=True)
    without = template.render([USER, ANSWER, USER], add_generation_prompt=True)
    template.close()

    assert with_reasoning == without
