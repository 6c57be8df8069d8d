"""Chat templates: what they may use, what they may not do, and what a chat that does not fit is told."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from brlite.chat.reply import find_reply_format
from brlite.chat.template import ChatTemplate
from brlite.chat.tool_calls import PARSERS
from brlite.chat.turns import TemplateExtras
from brlite.conversion.convert import read_side_files
from brlite.errors import InvalidRequest, ModelError
from brlite.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.conftest import write_folder

HELLO = [{"role": "user", "content": "hello"}]


def render(template: str, messages: list[dict[str, Any]] = HELLO, **special_tokens: str) -> str:
    compiled = ChatTemplate(template, source="here", special_tokens=special_tokens)
    return compiled.render(messages, add_generation_prompt=True)


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A model folder without a template."""
    shutil.copytree(llama_folder, tmp_path / "model")
    return write_folder(tmp_path / "model", tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})


def rendered(tokenizer: Tokenizer) -> str:
    return tokenizer.render_chat(HELLO)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].role }}: {{ messages[0]['content'] }}", "user: hello"),
        ("{% if add_generation_prompt %}yes{% endif %}", "yes"),
        ("  {% if tools is none %}\n  a\n  {% endif %}\n", "  a\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c", "abhelloc"),
        ("{{ {'k': '<你>'} | tojson }}", '{"k": "<你>"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ documents is defined }}{{ bos_token is defined }}", "FalseFalse"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 5 %}{{ ns.n }}", "5"),
    ],
)
def test_templates_find_what_they_expect(template: str, expected: str) -> None:
    assert render(template) == expected


def test_templates_know_the_special_tokens_that_the_model_has() -> None:
    assert render("{{ bos_token }}|{{ eos_token }}", bos_token="<s>") == "<s>|"


def test_templates_can_tell_the_date() -> None:
    before = datetime.now().year

    year = int(render("{{ strftime_now('%Y') }}"))

    assert before <= year <= datetime.now().year


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ messages[7].content.strip() }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'other' %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for a in range(1000) %}{% for b in range(1000) %}long enough{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_refuses_fails_or_runs_away_is_a_bad_request(template: str) -> None:
    with pytest.raises(InvalidRequest, match="Error in applying chat template from request") as caught:
        render(template)

    assert caught.value.param == "messages"
    assert "/v1/completions" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_reaches_nothing_of_python() -> None:
    roads = (
        "''.__class__",
        "''['__class__']",
        "''|attr('__class__')",
        "['']|map(attribute='__class__')|first",
        "(messages|groupby('__class__')|first)[0]",
        "messages.index.__self__",
        "raise_exception.__globals__",
        "strftime_now|attr('__code__')",
        "cycler.__init__",
        "namespace['__init__']",
        "joiner|attr('__init__')",
        "lipsum.__globals__",
        "self._TemplateReference__context",
        "(1).__add__",
        "'{0.__class__}'.format('')",
        "'{a.__class__}'.format_map({'a': ''})",
        "(['{0.__class__}']|map(attribute='format')|first)('')",
        "('{0.__class__}'|attr('format'))('')",
    )

    assert render("".join(f"{{{{ {road} }}}}" for road in roads)) == ""


def test_a_long_chat_is_rendered_whole() -> None:
    messages = [{"role": "user", "content": "x" * 1_000_000}]

    assert len(render("{% for m in messages %}[{{ m.content }}]{% endfor %}", messages)) == 1_000_002


def test_messages_that_are_no_plain_data_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="Error in applying chat template from request"):
        render("{{ messages }}", [{"role": "user", "content": object()}])


def test_a_broken_template_is_found_when_it_is_loaded() -> None:
    with pytest.raises(ModelError, match="here: the chat template is broken"):
        render("{% for %}")


def test_a_model_without_a_template_points_to_completions(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)

    with pytest.raises(InvalidRequest, match=r"from request: the model has no.*/v1/completions") as caught:
        tokenizer.encode_chat(HELLO)

    assert caught.value.param == "messages"
    assert not tokenizer.has_chat_template


def test_the_operators_file_goes_before_the_folders_and_that_before_the_config(folder: Path, tmp_path: Path) -> None:
    found = []

    write_folder(folder, tokenizer_config={"chat_template": "config"})
    found.append(rendered(load_tokenizer(folder)))
    (folder / "chat_template.jinja").write_text("folder")
    found.append(rendered(load_tokenizer(folder)))
    (tmp_path / "own.jinja").write_text("operator")
    found.append(rendered(load_tokenizer(folder, chat_template=tmp_path / "own.jinja")))

    assert found == ["config", "folder", "operator"]


def test_an_old_template_file_is_read(folder: Path) -> None:
    write_folder(folder, chat_template={"chat_template": "from a file"})

    assert rendered(load_tokenizer(folder)) == "from a file"


TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TOOL_USE = (
    "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("has_files", [False, True])
def test_a_chat_with_tools_gets_the_template_named_tool_use(folder: Path, has_files: bool) -> None:
    if has_files:
        (folder / "chat_template.jinja").write_text("plain {{ mood }}")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
    else:
        named = [{"name": "default", "template": "plain {{ mood }}"}, {"name": "tool_use", "template": TOOL_USE}]
        write_folder(folder, tokenizer_config={"chat_template": named})

    tokenizer = load_tokenizer(folder)

    assert rendered(tokenizer) == "plain "
    assert tokenizer.render_chat(HELLO, extras=TemplateExtras(tools=[TOOL])) == "[now]hello"
    assert tokenizer.chat_format is not None
    assert find_reply_format(tokenizer.chat_format, "auto", "auto").calls is PARSERS["hermes"]
    assert {"mood", "tools"} <= tokenizer.chat_format.capabilities.variables


def test_a_bundle_keeps_the_template_for_tools(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("plain")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name, content in read_side_files(folder, {}).items():
        (bundle / name).write_bytes(content)

    tokenizer = load_tokenizer(bundle)

    assert rendered(tokenizer) == "plain"
    assert tokenizer.render_chat(HELLO, extras=TemplateExtras(tools=[TOOL])) == "[now]hello"


def test_named_templates_may_be_an_object(folder: Path) -> None:
    write_folder(folder, tokenizer_config={"chat_template": {"default": "plain", "tool_use": TOOL_USE}})

    assert rendered(load_tokenizer(folder)) == "plain"


@pytest.mark.parametrize("template", [[{"name": "tool_use", "template": "x"}], 5, [1], [{"name": [], "template": "x"}]])
def test_a_template_that_is_no_string_is_refused(folder: Path, template: object) -> None:
    write_folder(folder, tokenizer_config={"chat_template": template})

    with pytest.raises(ModelError, match="chat_template must be a string, or a list of named ones"):
        load_tokenizer(folder)


def test_a_missing_template_file_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"chat template .*missing\.jinja"):
        load_tokenizer(folder, chat_template=tmp_path / "missing.jinja")


def test_lone_surrogates_are_refused_with_the_callers_field(llama_folder: Path) -> None:
    tokenizer = load_tokenizer(llama_folder)

    with pytest.raises(InvalidRequest, match="lone surrogate") as chat:
        tokenizer.encode_chat([{"role": "user", "content": "\ud800"}])
    with pytest.raises(InvalidRequest, match="lone surrogate") as prompt:
        tokenizer.encode("\udfff", param="prompt")
    tokenizer.close()  # the errors' tracebacks keep it alive

    assert (chat.value.param, prompt.value.param) == ("messages", "prompt")
