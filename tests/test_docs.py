"""README and docs/ cannot go stale: their examples run, their links lead somewhere, and their tables are the code's."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from brlite.backends.native.abi import ISAS
from brlite.backends.plugins.toy import ToyOptions
from brlite.chat.tool_calls import PARSERS
from brlite.commands import cli, conversation
from brlite.commands.arguments import COMMANDS
from brlite.commands.command_line import OTHERS, CommandParser
from brlite.config.load import load_config
from brlite.config.options import DEFAULT_MODEL, Config, LimitsConfig
from brlite.config.proxy_files import load_proxy_config
from brlite.config.warnings import config_warnings
from brlite.dialects import openai_chat
from brlite.dialects.errors import STATUSES
from brlite.http.connection import MAX_HEADERS
from brlite.models.registry import FAMILIES
from brlite.sampling_params import SamplingParams, parameters
from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, free_port, get, running, wait_until_it_answers
from tests.test_house import ALLOWED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
EXAMPLES = {
    f"{name}-{number}": code
    for name, text in {"README": README, **PAGES}.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), 1)
}
CHAT_BODIES = {
    f"{name}-{number}": body
    for name, text in PAGES.items()
    for number, body in enumerate(re.findall(r"```json\n(.*?)```", text, re.DOTALL), 1)
    if '"messages"' in body
}
# These need a running server.
PYTHON_NOT_RUN_HERE = {
    "http-api-1": "tests/server/test_responses.py runs it",
    "http-api-2": "tests/server/test_messages.py runs it",
    "structured-output-1": "tests/server/test_structured_output.py runs it",
}
PACKAGES = {"embedding-4": "fastapi"}  # what an example needs and no extra of ours installs
SHELL_EXAMPLES = {
    f"{name}-{number}": code
    for name, text in {"README": README, **PAGES}.items()
    for number, code in enumerate(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL), 1)
}
# Those that no test of this file runs, and why. The arguments of their brlite commands are parsed all the same.
NOT_RUN_HERE = {
    "README-1": "`.ci/run` installs in a fresh venv; tests/test_end_to_end.py serves the default model",
    "README-2": "tests/test_end_to_end.py sends such a request; another test compares the model's name",
    "README-3": "it is the command that runs this test",
    "README-4": "the models would be downloaded",
    "conversion-1": "two of the models have 72 billion weights; tests/conversion converts small ones",
    "deployment-1": "needs systemd, and root",
    "deployment-2": "needs Docker; tests/test_deploy.py checks the files",
    "deployment-3": "needs a Kubernetes cluster; tests/test_deploy.py checks the manifests against the schemas",
    "deployment-4": "needs a Ray cluster; tests/test_ray_serve.py starts one on loopback",
    "devices-1": "needs a card; `.ci/run` runs the check with --device cpu",
    "devices-2": "needs two NUMA nodes",
    "installation-1": "the same command as README-1",
    "installation-2": "it builds in fresh venvs for minutes, and ends with a request to the wheel's own server",
    "installation-3": "it fetches all wheels; deploy/docker/Containerfile has the same step",
    "installation-4": "it needs those wheels",
    "keys-1": "it takes the default port; tests/config/test_options.py reads the variable",
    "migrating-1": "needs Ollama, with a model",
    "proxy-1": "needs the servers it names; tests/test_proxy_command.py starts such ones",
    "tensor-parallelism-1": "needs two machines; tests/test_ranks.py starts ranks on one",
}
# Words of other programs, or of what is refused, that stand in the pages like words of the code.
OF_OTHERS = {
    *("ANTHROPIC_API_KEY", "client_max_body_size", "proxy_read_timeout", "send_timeout"),
    *("file_search", "hf_overrides", "modules_to_not_convert"),
    *("http_requests_total", "http_request_duration_seconds"),
}
QUERIES = re.findall(r"\| `([^`]+)` \|$", PAGES["metrics"].split("## Queries for Grafana")[1], re.MULTILINE)
ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b")
MAY_BE_SHOWN = ("127.", "0.0.0.0", "192.0.2.", "198.51.100.", "203.0.113.")  # loopback, any, RFC 5737's


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table under a heading: the name in the first cell, then the other cells."""
    section = re.split(r"\n##+ ", PAGES[page].split(heading, 1)[1], maxsplit=1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in rows}


@pytest.mark.model
@pytest.mark.parametrize("example", [name for name in EXAMPLES if name not in PYTHON_NOT_RUN_HERE])
def test_the_examples_run(example: str, smollm2_path: Path) -> None:
    pytest.importorskip(PACKAGES.get(example, "brlite"))
    command = [sys.executable, "-c", EXAMPLES[example]]

    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)

    assert result.returncode == 0, result.stderr


def test_each_example_that_is_not_run_here_exists() -> None:
    assert set(PYTHON_NOT_RUN_HERE) <= set(EXAMPLES)


@pytest.mark.parametrize("body", CHAT_BODIES.values(), ids=CHAT_BODIES)
def test_the_bodies_of_chats_are_accepted_without_a_warning(body: str) -> None:
    assert openai_chat.decode(body.encode(), LimitsConfig()).warnings == ()


def test_each_body_that_curl_sends_is_sent_as_json() -> None:
    pages = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    commands = [found[0] for text in pages for found in re.finditer(r"curl .*(?:\\\n.*)*", text) if " -d " in found[0]]

    assert commands
    assert [line for line in commands if "-H 'Content-Type: application/json'" not in line] == []


def test_each_shell_example_is_run_or_has_a_reason_not_to_be() -> None:
    assert set(SHELL_EXAMPLES) - {"engines-1"} == set(NOT_RUN_HERE)


@pytest.mark.parametrize("example", SHELL_EXAMPLES.values(), ids=SHELL_EXAMPLES)
def test_the_commands_of_shell_examples_have_arguments_that_exist(example: str) -> None:
    lines = example.replace("\\\n", " ")

    for arguments in re.findall(r"^(?:torchrun .* |numactl .* |.*/bin/|)brlite (.*?)&?$", lines, re.MULTILINE):
        assert cli.command_parser().parse_args(shlex.split(arguments, comments=True))


def test_the_toy_serves_as_its_example_says() -> None:
    command = shlex.split(SHELL_EXAMPLES["engines-1"].replace("brlite", BRLITE))
    port = free_port()

    with running([*command, "--port", str(port)], stderr=subprocess.DEVNULL):
        wait_until_it_answers(port)
        status, text = get(port, "/v1/models")

    assert (status, [model["id"] for model in json.loads(text)["data"]]) == (200, ["my-model"])


def test_the_page_and_the_file_of_options_are_those_that_are_printed() -> None:
    printed = runpy.run_path(str(ROOT / "docs" / "configuration.py"))

    assert PAGES["configuration"] == printed["render"](), "run: python docs/configuration.py"
    assert (ROOT / "brlite.toml").read_text(encoding="utf-8") == printed["default_toml"](), "run the same"


def test_the_metrics_that_pages_and_alerts_name_exist() -> None:
    alerts = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    missing = r"^\| .*(?:not counted|there is no|there are no|not measured).*$"  # a table of vLLM's that stay empty
    texts = [alerts, README, *(re.sub(missing, "", page, flags=re.MULTILINE) for page in PAGES.values())]
    asked = {name for text in texts for name in re.findall(r"(?:vllm|brlite):\w+", text)}
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "brlite").rglob("*.py"))
    there = {re.sub(r"_total$", "", name) for name in re.findall(r"(?:vllm|brlite):\w+", code)}

    assert len(asked) > 50
    assert {re.sub(r"_(total|bucket|sum|count|info)$", "", name) for name in asked} - {
        re.sub("_info$", "", name) for name in there
    } == set()


def test_the_dashboard_has_the_queries_for_grafana() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "dashboard.py"))

    assert page["DASHBOARD"].read_text(encoding="utf-8") == page["dashboard"](), "run: python docs/dashboard.py"
    assert [query for _, query in page["queries"]()] == QUERIES


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed: it has promtool")
def test_promtool_accepts_the_queries_for_grafana(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(QUERIES)]
    path = tmp_path / "rules.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "docs", "rules": rules}]}))

    result = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)

    assert f"SUCCESS: {len(QUERIES)} rules found" in result.stdout, result.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed: it has promtool")
def test_promtool_accepts_the_alerts() -> None:
    path = ROOT / "deploy" / "prometheus" / "alerts.yml"

    result = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)

    assert "SUCCESS: 4 rules found" in result.stdout, result.stderr


def test_the_limits_are_those_of_the_code() -> None:
    documented = {name: cells[0] for name, cells in table("refusals", "## Limits").items()}

    assert documented == {name: str(value) for name, value in msgspec.structs.asdict(LimitsConfig()).items()}


def test_every_refusal_is_explained() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "brlite").rglob("*.py"))
    codes = {*(status.code for status in STATUSES.values()), *re.findall(r'\bcode="(\w+)"', source)}
    section = PAGES["refusals"].split("# Why a request is refused", 1)[1].split("\n## ", 1)[0]

    rows = re.findall(r"^\| (?:\d+|\d+, \d+|any from 400) \| (`.*?) \|", section, re.MULTILINE)

    assert {code for row in rows for code in re.findall(r"`(\w+)`", row)} == codes


def test_the_limit_that_has_no_key_is_that_of_the_code() -> None:
    assert f"| header lines (fixed) | {MAX_HEADERS} | 431 |" in PAGES["refusals"]


def sampling_rows() -> dict[str, tuple[str, str]]:
    """The range and the default of each parameter in docs/sampling.md. A row of several has them in the same order."""
    rows: dict[str, tuple[str, str]] = {}
    for row, (shown, default, _) in table("sampling", "# Sampling parameters").items():
        names = row.split("`, `")
        ranges = shown.split("; ") if len(names) > 1 and ";" in shown else [shown] * len(names)
        defaults = default.split(", ") if len(names) > 1 else [default]
        rows |= dict(zip(names, zip(ranges, defaults, strict=True), strict=True))
    return rows


def test_the_sampling_parameters_are_those_of_the_code() -> None:
    assert sampling_rows().keys() == set(SamplingParams.__struct_fields__) - {"stop_tokens_ids"}


def test_the_defaults_of_sampling_parameters_are_those_of_the_code() -> None:
    shown = {name: default.split(";")[0] for name, (_, default) in sampling_rows().items()}
    words = {None: ("none", "random", "`n`"), (): ("none", "all"), False: ("false",), True: ("true",)}

    for name, default in shown.items():
        value = parameters()[name].default
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert float(default) == value, name
        elif name == "dry_sequence_breakers":
            assert tuple(json.loads(f"[{default.replace('`', '')}]".replace('"""', r'"\""'))) == value
        else:
            assert default in (words[value] if value != {} else ("none",)), name


def test_the_ranges_of_sampling_parameters_are_those_of_the_code() -> None:
    kinds = {name: msgspec.inspect.type_info(parameter.type) for name, parameter in parameters().items()}
    bounds = {name: bounds_of(kind) for name, kind in kinds.items() if bounds_of(kind) is not None}
    shown = {name: bounds_shown(text) for name, (text, _) in sampling_rows().items() if name in bounds}

    assert len(bounds) > 20
    assert shown == bounds | {"top_n_sigma": (-1, False, None)}  # -1 is read as 0


def bounds_of(kind: msgspec.inspect.Type) -> tuple[float, bool, float | None] | None:
    """The lowest number of a type, whether that itself is refused, and the highest one; None where it has no bounds."""
    if isinstance(kind, msgspec.inspect.Metadata):
        return bounds_of(kind.type)
    if isinstance(kind, msgspec.inspect.UnionType):
        return next((bounds for each in kind.types if (bounds := bounds_of(each)) is not None), None)
    if not isinstance(kind, msgspec.inspect.IntType | msgspec.inspect.FloatType):
        return None
    lowest = kind.ge if kind.gt is None else kind.gt
    is_bounded = lowest is not None and lowest > -sys.float_info.max
    return (lowest, kind.gt is not None, kind.le if kind.le != sys.float_info.max else None) if is_bounded else None


def bounds_shown(text: str) -> tuple[float, bool, float | None]:
    """The same of a range in the page: `0 to 1`, `above 0, to 1`, `1 or more`, `-1: all; 0: off; …`."""
    found = re.match(r"(above )?(-?\d+)(?:,? to (\d+))?", text)
    assert found, text
    return float(found[2]), found[1] is not None, float(found[3]) if found[3] else None


def test_every_option_that_a_page_names_exists() -> None:
    tables = {
        name: table for name, table in msgspec.structs.asdict(Config()).items() if isinstance(table, msgspec.Struct)
    }
    pages = {name: text for name, text in PAGES.items() if name != "architecture"}  # it names files like that, too
    options = {f"{name}.{option}" for name, table in tables.items() for option in table.__struct_fields__}
    named = {name for text in pages.values() for name in re.findall(rf"`((?:{'|'.join(tables)})\.\w+)`", text)}

    assert len(named) > 30
    assert named - options == set()


def test_the_words_of_code_in_pages_are_in_the_code() -> None:
    """Options, fields, functions and files: a name of theirs that changes must change here, too."""
    folders = [ROOT / folder for folder in ("brlite", "bench", "deploy", "tests")]
    files = [ROOT / "setup.cfg", *(path for folder in folders for path in folder.rglob("*.*"))]
    kinds = (".py", ".h", ".cpp", ".js", ".toml", ".yml", ".yaml", ".json", ".cfg", ".service")
    code = "\n".join(
        path.read_text(encoding="utf-8") for path in files if path.suffix in kinds and path != Path(__file__)
    )
    known = set(re.findall(r"\w+", code)) | OF_OTHERS
    named = {
        (name, word)
        for name, text in {"README": README, **PAGES}.items()
        for word in re.findall(r"`([A-Za-z]+_\w+)`", text)
        if not word.startswith(("OLLAMA_", "VLLM_", "manylinux_"))
    }

    assert len(named) > 500
    assert {(name, word) for name, word in named if word not in known} == set()


def test_the_options_of_the_page_for_people_from_other_servers_exist() -> None:
    section = PAGES["migrating"].split("## Options", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    parser = CommandParser()
    COMMANDS["serve"][0](parser)
    ours = set(parser._option_string_actions)
    theirs = {flag for row in rows for cell in row[1:3] for flag in re.findall(r"`(--?[\w-]+)", cell)}
    printed = runpy.run_path(str(ROOT / "docs" / "configuration.py"))
    tables = {table.name: {option.name for option in table.options} for table in printed["option_tables"]()}
    named = [
        (table, option)
        for row in rows
        for options, table in re.findall(
            r"((?:`\w+`,? ?)+)in `\[+(\w+)\]+`", row[-2] if not row[-1].strip() else row[-1]
        )
        for option in re.findall(r"\w+", options)
    ]

    assert len(rows) > 20
    assert {flag for row in rows for flag in re.findall(r"`(--[\w-]+)", row[-1])} - ours == set()
    assert theirs - OTHERS.keys() - ours == set(), "typing one of these gives no hint"
    assert len(named) > 10
    assert [(table, option) for table, option in named if option not in tables[table]] == []


def test_the_page_of_metrics_has_every_metric_of_ours() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "brlite").rglob("*.py"))

    ours, shown = (
        {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in re.findall(r"brlite:\w+", text)}
        for text in (code, PAGES["metrics"])
    )

    assert shown == ours


def test_the_formats_of_calls_are_those_of_the_code() -> None:
    assert table("tools", "## Formats").keys() - {"tool_parser"} == PARSERS.keys()


def test_the_page_of_commands_has_every_command() -> None:
    named = set(re.findall(r"`(?:torchrun … --no-python )?brlite ([a-z][\w-]*)", README + PAGES["cli"]))

    assert named == set(COMMANDS)


def test_the_page_of_commands_has_every_command_of_a_chat() -> None:
    section = PAGES["cli"].split("## Chat", 1)[1].split("\n## ", 1)[0]

    assert set(re.findall(r"`(/\w+)", section)) == set(conversation.COMMANDS)


def test_the_table_of_models_has_every_architecture() -> None:
    rows = PAGES["models"].split("## Models", 1)[1].split("\n* ", 1)[0]
    there = {name for family in FAMILIES for name in (family.architecture, *family.aliases)}

    assert set(re.findall(r"`(\w+For\w+|\w+Model)`", rows)) == there


def test_the_functions_that_the_page_of_architecture_names_exist() -> None:
    section = PAGES["architecture"].split("## Where it is decided", 1)[1].split("\n## ", 1)[0]
    named = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`[ ,]*)+)", section)

    assert len(named) > 5
    for path, functions in named:
        code = (ROOT / "brlite" / path).read_text(encoding="utf-8")
        assert [name for name in re.findall(r"\w+", functions) if f"def {name}(" not in code] == [], path


def test_the_environment_variables_are_those_of_the_code() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "brlite").rglob("*.py"))
    section = PAGES["cli"].split("## Environment variables", 1)[1]

    assert set(re.findall(r"`(BRLITE_\w+)`", section)) == set(re.findall(r'"(BRLITE_[A-Z_]+)"', code))


def test_the_page_of_devices_has_every_instruction_set() -> None:
    section = PAGES["devices"].split("## CPU kernels", 1)[1].split("\n\n", 2)[1]

    assert set(re.findall(r"`([a-z]\w+)`", section)) == set(ISAS)


def test_the_toys_options_are_those_of_the_code() -> None:
    assert set(table("engines", "## The toy")) == set(ToyOptions.__struct_fields__)


def test_the_tree_shows_every_room_and_file_of_the_root() -> None:
    tree = PAGES["architecture"].split("## The house", 1)[1].split("```")[1]
    there = {path.stem for path in (ROOT / "brlite").iterdir() if path.name[0] != "." and path.suffix in ("", ".py")}
    folders = re.findall(r"^  (\w+)/", tree, re.MULTILINE)

    assert there - {"__pycache__"} <= set(re.findall(r"\w+", tree))
    assert [name for name in folders if not (ROOT / "brlite" / name).is_dir()] == []


def test_the_files_that_the_page_of_architecture_names_exist() -> None:
    folders = (ROOT / "brlite", ROOT / "tests", ROOT / "docs", ROOT / "bench", ROOT / "deploy")
    there = "\n".join(f"/{path.relative_to(ROOT).as_posix()}\n" for folder in folders for path in folder.rglob("*.*"))
    tables = PAGES["architecture"].split("## Where to write", 1)[1].split("## Worked examples", 1)[0]
    named = set(re.findall(r"`([\w/]+\.(?:py|cpp|h))`", tables))

    assert len(named) > 50
    assert {name for name in named if f"/{name}\n" not in there} == set()


def test_the_readmes_tree_shows_every_room() -> None:
    tree = README.split("## Where the code is", 1)[1].split("```")[1]
    rooms = {path.parent.name for path in (ROOT / "brlite").glob("*/__init__.py")}

    assert rooms <= set(re.findall(r"(\w+)/", tree))


def test_the_import_table_is_the_one_that_is_enforced() -> None:
    documented = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGES["architecture"], re.MULTILINE)

    assert {room: cell.replace("`", "").replace("–", "").replace(",", "") for room, cell in documented} == {
        room: rooms for room, (rooms, _) in ALLOWED.items()
    }


def test_the_example_of_a_key_is_one(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(PAGES["keys"].split("# API keys", 1)[1].split("```toml")[1].split("```")[0])

    (key,) = load_config(path).key

    assert key.requests_per_minute > 0


def test_the_example_of_a_proxy_is_one_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text(PAGES["proxy"].split("# Proxy", 1)[1].split("```toml")[1].split("```")[0])

    config = load_proxy_config([path])

    assert config_warnings(config) == []
    assert len(config.upstream) == 3


def test_the_example_of_several_models_is_one(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    first, on_demand = (each.split("```")[0] for each in PAGES["several-models"].split("```toml")[1:3])
    path.write_text(first)
    assert [spec.name for spec in load_config(path).model] == ["chat", "code"]

    path.write_text(on_demand)
    config = load_config(path)

    assert config.engine.memory_gib > 0
    assert [spec.load for spec in config.model] == ["start", "on_demand"]


def test_the_curl_line_asks_for_the_default_model() -> None:
    assert f'"model": "{DEFAULT_MODEL}"' in README


def test_the_test_command_is_the_one_of_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")

    assert "pip install -e '.[test]' && .venv/bin/pytest" in README
    assert "-c constraints.txt -e '.[test,all]'" in README
    assert "--editable '.[test]'" in ci
    assert "--constraint constraints.txt --editable '.[test,all]'" in ci
    assert "pytest" in ci


def test_the_readme_is_for_a_person_in_a_hurry() -> None:
    assert README.count("\n") <= 150


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.md")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_links_lead_to_files_and_headings_that_exist(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))

    for link in (link for link in links if not re.match(r"https?:|mailto:", link)):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def headings(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("text", [README, *PAGES.values()], ids=["README", *PAGES])
def test_no_example_names_an_address_that_a_reader_could_dial_by_mistake(text: str) -> None:
    assert [address for address in ADDRESS.findall(text) if not address.startswith(MAY_BE_SHOWN)] == []


def test_every_page_is_linked_from_the_readme() -> None:
    assert {name for name in PAGES if f"docs/{name}.md" not in README} == set()
