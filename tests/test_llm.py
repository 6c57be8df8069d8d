"""A model put together from real files: offline, embedded in an event loop, and under every kind of pressure."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from brlite import engine
from brlite.commands.generate import generate as run_generate
from brlite.config.options import Config, EngineConfig, LimitsConfig, ModelSpec
from brlite.engine.outputs import RequestOutput
from brlite.errors import ConfigError, InvalidRequest, ModelError
from brlite.llm import LLM, AsyncEngine, build_engine
from brlite.sampling_params import SamplingParams

pytestmark = pytest.mark.torch

GREEDY_GIVEN = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
GREEDY = SamplingParams(**GREEDY_GIVEN)
PROMPTS = ["The first prompt", "a second", "The first prompt, and more of it", "x", "The first pr"]


def make_config(tiny_folder: Path, *, engine: dict[str, Any] | None = None, **model: Any) -> Config:
    spec = ModelSpec(**{"name": "tiny", "path": str(tiny_folder), "build_seq": 128, "build_batch": 4, **model})
    return Config(model=(spec,), engine=EngineConfig(**{"dtype": "float32", "device": "cpu", **(engine or {})}))


def texts(config: Config, prompts: list[str], params: SamplingParams = GREEDY) -> list[str]:
    with LLM(config=config) as llm:
        return [output.outputs[0].text for output in llm.generate(prompts, params)]


def test_the_manuals_json_and_its_offline_script_work(tiny_folder: Path, tmp_path: Path) -> None:
    config = {
        "model": "tiny",
        "cached_dir": str(tiny_folder),
        "input_name": "input_ids.1",
        "output_name": "9",
        "vocab_size": 300,
        "model_file": "/models/tiny.pt",
        "serialize_file": "",
        "model_precision": "a_bf16_w_int8_kv_int8",
        "build_seq": 128,
        "build_batch": 4,
        "distribute_param": [1, 1, 1],
        "devices": [0],
        "all_models": {"http://host_ip:port": "tiny"},
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config))

    with LLM(config_path=str(path), trust_remote_code=True) as llm:
        outputs = llm.generate(PROMPTS, [SamplingParams(max_tokens=number + 1, n=2) for number in range(5)])

    assert [output.prompt for output in outputs] == PROMPTS
    assert [len(output.outputs) for output in outputs] == [2] * 5
    assert all(output.finished and isinstance(output.outputs[0].text, str) for output in outputs)


@pytest.mark.parametrize(
    "pressure",
    [
        {"engine": {"max_num_batched_tokens": 4}},
        {"engine": {"prefix_caching": False}},
        {"engine": {"block_size": 8}, "num_blocks": 8, "build_batch": 3},
        {"build_batch": 1},
    ],
    ids=["small chunks", "no prefix cache", "preemption", "one at a time"],
)
def test_a_text_does_not_depend_on_chunks_caches_company_or_preemption(
    tiny_folder: Path, pressure: dict[str, Any]
) -> None:
    expected = texts(make_config(tiny_folder), PROMPTS)

    assert texts(make_config(tiny_folder, **pressure), PROMPTS) == expected


def test_a_seeded_text_does_not_depend_on_its_company(tiny_folder: Path) -> None:
    params = [SamplingParams(seed=seed, temperature=1.5, top_k=50, max_tokens=10, ignore_eos=True) for seed in range(5)]
    with LLM(config=make_config(tiny_folder)) as llm:
        together = [output.outputs[0].text for output in llm.generate(PROMPTS, params)]
        alone = [llm.generate(prompt, each)[0].outputs[0].text for prompt, each in zip(PROMPTS, params, strict=True)]

    assert together == alone
    assert len(set(together)) == len(PROMPTS)


def test_n_beyond_the_batch_runs_in_turns(tiny_folder: Path) -> None:
    with LLM(config=make_config(tiny_folder, build_batch=2)) as llm:
        (output,) = llm.generate("several", SamplingParams(n=7, seed=1, max_tokens=6, ignore_eos=True))

    assert [completion.index for completion in output.outputs] == list(range(7))
    assert len({completion.text for completion in output.outputs}) == 7


def test_the_best_of_many_completions_are_given_best_first(tiny_folder: Path) -> None:
    asked: dict[str, Any] = {"seed": 1, "max_tokens": 4, "ignore_eos": True}
    with LLM(config=make_config(tiny_folder)) as llm:
        (made,) = llm.generate("several", SamplingParams(n=6, logprobs=0, **asked))
        best, shown = llm.generate(
            ["several"] * 2,
            [SamplingParams(n=2, best_of=6, **asked), SamplingParams(n=2, best_of=6, logprobs=0, **asked)],
        )

    expected = sorted(made.outputs, key=lambda completion: -completion.mean_logprob)[:2]
    for output in (best, shown):
        assert [completion.token_ids for completion in output.outputs] == [each.token_ids for each in expected]
        assert [completion.index for completion in output.outputs] == [0, 1]
    assert [completion.logprobs for completion in best.outputs] == [None, None]
    told = [[entry.token_id for entry in completion.logprobs or ()] for completion in shown.outputs]
    assert told == [each.token_ids for each in expected]


def test_the_best_are_not_chosen_of_completions_that_are_given_as_they_come(tiny_folder: Path) -> None:
    async def ask() -> None:
        async with AsyncEngine.from_config(make_config(tiny_folder)) as engine:
            async for _ in engine.generate("x", SamplingParams(best_of=2)):
                pass

    with pytest.raises(InvalidRequest, match="best_of is not for completions that are given as they come"):
        asyncio.run(ask())


def test_a_wrong_prompt_raises_before_anything_runs_and_the_next_call_works(tiny_folder: Path) -> None:
    finished: list[int] = []
    with LLM(config=make_config(tiny_folder)) as llm:
        with pytest.raises(InvalidRequest, match=r"prompts\[9\]: "):
            llm.generate(["good"] * 9 + ["x" * 500], GREEDY, on_finished=lambda number, output: finished.append(number))
        outputs = llm.generate(["good"], GREEDY)

    assert finished == []
    assert outputs[0].finished


def test_each_output_is_reported_as_it_is_done_and_what_goes_wrong_there_gets_out(tiny_folder: Path) -> None:
    reported: list[tuple[int, str | None]] = []
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in (9, 3, 6)]

    def full_disk(number: int, output: RequestOutput) -> None:
        raise OSError("no space left")

    with LLM(config=make_config(tiny_folder)) as llm:
        llm.generate(PROMPTS[:3], params, on_finished=lambda number, output: reported.append((number, output.prompt)))
        with pytest.raises(OSError, match="no space left"):
            llm.generate("x", GREEDY, on_finished=full_disk)

    assert reported == [(1, PROMPTS[1]), (2, PROMPTS[2]), (0, PROMPTS[0])]


def test_an_interrupt_at_any_function_of_the_engine_leaves_it_empty_for_the_next_call() -> None:
    config = Config(model=(ModelSpec(name="toy", build_batch=2, build_seq=64),), engine=EngineConfig(name="toy"))
    params = [SamplingParams(max_tokens=2, n=2, seed=0), SamplingParams(max_tokens=4, stop="st")]
    interrupted, before = set[CodeType](), sys.gettrace()

    def interrupt(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if Path(code.co_filename).parent == Path(engine.__file__).parent and code not in interrupted:
            interrupted.add(code)
            raise KeyboardInterrupt

    def generate(llm: LLM) -> list[str]:
        return [each.text for output in llm.generate(["abcd" * 5, "the first"], params) for each in output.outputs]

    with LLM(config=config) as llm:
        expected, found = generate(llm), list[str]()
        while not found:
            sys.settrace(interrupt)
            try:
                found = generate(llm)  # each of its functions was interrupted before
            except KeyboardInterrupt:
                llm._engine.check_integrity()
            finally:
                sys.settrace(before)

    assert found == expected
    assert len(interrupted) > 50


def test_the_queue_limits_of_a_server_do_not_bind_offline(tiny_folder: Path) -> None:
    limits = LimitsConfig(max_waiting=1, max_wait_seconds=1e-6)
    config = msgspec.structs.replace(make_config(tiny_folder), limits=limits)

    assert len(texts(config, PROMPTS * 3)) == 15


def test_a_load_that_is_cancelled_is_closed_when_it_is_done(tiny_folder: Path) -> None:
    async def cancel() -> None:
        loading = AsyncEngine.from_config(make_config(tiny_folder))
        task = asyncio.ensure_future(loading.__aenter__())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        for thread in threading.enumerate():
            if thread.name == "brlite-load":
                await asyncio.to_thread(thread.join, 60)

    asyncio.run(cancel())

    assert not any(thread.name == "brlite-load" for thread in threading.enumerate())


def test_closing_twice_is_closing_once(tiny_folder: Path) -> None:
    with LLM(config=make_config(tiny_folder)) as llm:
        llm.close()


@pytest.mark.parametrize("prompts", [[1, 2, 3], [None], ["a", 3], [["a"]]])
def test_prompts_that_are_neither_text_nor_token_ids_are_refused(tiny_folder: Path, prompts: Any) -> None:
    with LLM(config=make_config(tiny_folder)) as llm, pytest.raises(InvalidRequest, match="integer token ids"):
        llm.generate(prompts, GREEDY)


def test_one_set_of_parameters_or_one_for_each_prompt(tiny_folder: Path) -> None:
    with LLM(config=make_config(tiny_folder)) as llm, pytest.raises(InvalidRequest, match="2 entries for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])


def test_online_and_offline_say_the_same(tiny_folder: Path) -> None:
    config = make_config(tiny_folder)

    async def ask(engine: AsyncEngine, prompt: str) -> str:
        return "".join([output.outputs[0].text async for output in engine.generate(prompt, GREEDY)])

    async def online() -> list[str]:
        async with AsyncEngine.from_config(config) as engine:
            return list(await asyncio.gather(*(ask(engine, prompt) for prompt in PROMPTS)))

    assert asyncio.run(online()) == texts(config, PROMPTS)


def test_embedding_leaves_no_task_and_no_thread_and_two_engines_do_not_meet(tiny_folder: Path) -> None:
    async def embed() -> tuple[list[str], set[str]]:
        config = make_config(tiny_folder)
        async with AsyncEngine.from_config(config) as one, AsyncEngine.from_config(config) as two:
            found = []
            for engine in (one, two):
                async for output in engine.generate("hello", GREEDY):
                    if output.finished:
                        found.append(engine.info.name)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        return found, {task.get_name() for task in tasks if task is not None}

    threads = set(threading.enumerate())
    found, tasks = asyncio.run(embed())

    assert found == ["torch", "torch"]
    assert tasks == set()
    assert {thread.name for thread in set(threading.enumerate()) - threads} == set()


def test_progress_is_told_by_stage(tiny_folder: Path) -> None:
    told: list[tuple[str, float]] = []

    _, backend = build_engine(
        make_config(tiny_folder), on_progress=lambda stage, fraction: told.append((stage, fraction))
    )
    backend.close()

    assert list(dict.fromkeys(stage for stage, _ in told)) == [
        "reading the tokenizer",
        "starting torch",
        "reading the weights",
    ]
    assert told[-1][1] == 1.0


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ({"build_seq": 4096}, ConfigError, "build_seq"),
        ({"vocab_size": 301}, (ConfigError, ModelError), "vocab_size"),
        ({"path": "/proc/absent"}, ModelError, "/proc/absent"),
        ({"tensor_parallel": 5, "devices": (0, 1, 2, 3, 4)}, ConfigError, "tensor_parallel"),
    ],
)
def test_what_the_model_cannot_do_is_said_in_one_line(
    tiny_folder: Path, model: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        LLM(config=make_config(tiny_folder, **model))

    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    tokenizer.add_tokens([f"word{number}" for number in range(100)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    with pytest.raises(ModelError, match="the model only up to 299"):
        LLM(config=make_config(tmp_path))


def test_the_generate_command_answers_each_line_in_order(tiny_folder: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    source.write_text('plain line\n\n{"prompt": "as JSON", "max_tokens": 3, "n": 2}\n')

    status = run_generate(make_config(tiny_folder), str(source), str(target), GREEDY_GIVEN)

    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert status == 0
    assert [answer["prompt"] for answer in answers] == ["plain line", "as JSON"]
    assert [len(answer["outputs"]) for answer in answers] == [1, 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "top_p": 7}', "line 2: top_p"),
        ('{"prompt": "a", "frob": 7}', "line 2"),
        ('{"top_p": 1}', "line 2 has no prompt"),
        ('{"prompt": ', "line 2 is not JSON"),
    ],
)
def test_a_wrong_line_of_the_generate_command_is_named(
    tiny_folder: Path, tmp_path: Path, line: str, words: str
) -> None:
    source = tmp_path / "prompts.txt"
    source.write_text(f"good\n{line}\n")

    with pytest.raises(ConfigError, match=words):
        run_generate(make_config(tiny_folder), str(source), str(tmp_path / "out"), GREEDY_GIVEN)


def test_a_model_is_given_by_its_path_or_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.toml").write_text('[engine]\ndtype = "float32"\n[[model]]\nbuild_batch = 2\n')

    with LLM(tmp_path / "config.toml", model=tiny_folder) as llm:
        (output,) = llm.generate("The first prompt", GREEDY)

    assert output.outputs[0].text == texts(make_config(tiny_folder), ["The first prompt"])[0]
    with pytest.raises(ModelError, match="model no/such:Q8_0 was not found"):
        LLM(model="no/such:Q8_0")


def test_chat_frames_one_conversation_or_several(tiny_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")
    hello, bye = ([{"role": "user", "content": content}] for content in ("hello", "bye"))

    with LLM(config=make_config(tiny_folder, chat_template=str(template))) as llm:
        one = llm.chat(hello, GREEDY)
        two = llm.chat([hello, bye], GREEDY)
        expected = llm.generate(["user: hello\n", "user: bye\n"], GREEDY)

    assert [output.outputs[0].text for output in one + two] == [
        expected[number].outputs[0].text for number in (0, 0, 1)
    ]


async def test_a_chat_in_the_callers_loop_has_the_same_answer(tiny_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")
    config, hello = make_config(tiny_folder, chat_template=str(template)), [{"role": "user", "content": "hello"}]

    async with AsyncEngine.from_config(config) as engine:
        answer = "".join([output.outputs[0].text async for output in engine.chat(hello, GREEDY)])
        framed = "".join([output.outputs[0].text async for output in engine.generate("user: hello\n", GREEDY)])
        wrong: Any
        for wrong in ("hello", ["hello"], hello[0]):
            with pytest.raises(InvalidRequest, match="messages must be a list of"):
                await anext(engine.chat(wrong))

    assert answer == framed != ""


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ({"tensor_parallel": 2, "devices": (0,)}, "tensor_parallel"),
        ({"build_batch": -1}, "build_batch"),
        ({"precision": "int3"}, "precision"),
    ],
)
async def test_a_config_made_in_python_is_checked_like_a_file(
    tiny_folder: Path, model: dict[str, Any], field: str
) -> None:
    config = make_config(tiny_folder, **model)

    with pytest.raises(ConfigError, match=field):
        LLM(config=config)
    with pytest.raises(ConfigError, match=field):
        await AsyncEngine.load(config)


TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
CALLS = "{% for message in messages %}{{ message.role }}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "tool_parser", "is_said"),
    [
        (TOOLS + "Call by [[NAME]]." + CALLS, "auto", True),
        (TOOLS + "Call by [[NAME]]." + CALLS, "mistral", False),
        (TOOLS + "Call by <tool_call>." + CALLS, "auto", False),
        (CALLS, "auto", False),
    ],
)
def test_a_format_of_calls_that_no_parser_reads_is_said(
    text: str, tool_parser: str, is_said: bool, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(text)

    LLM(config=make_config(tiny_folder, chat_template=str(template), tool_parser=tool_parser)).close()

    assert ("has tool calls is not known" in caplog.text) is is_said


@pytest.mark.parametrize("messages", ["hello", ["hello"], [[{"role": "user", "content": "x"}, "hello"]], [3]])
def test_chat_says_what_a_conversation_is(tiny_folder: Path, messages: Any) -> None:
    with LLM(config=make_config(tiny_folder)) as llm, pytest.raises(InvalidRequest, match="messages must be a list of"):
        llm.chat(messages)


def test_chat_without_a_template_is_refused(tiny_folder: Path) -> None:
    with LLM(config=make_config(tiny_folder)) as llm, pytest.raises(InvalidRequest, match="template"):
        llm.chat([{"role": "user", "content": "hello"}])
