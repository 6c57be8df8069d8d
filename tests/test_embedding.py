"""A model inside somebody else's program: its threads, its forks, its loops, its Ctrl-C and what it forgets to close.

Each case runs in a process of its own, with `faulthandler`: what goes wrong here ends a process without a word.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.extras import HAS_TORCH
from tests.limits import PATIENCE_SECONDS
from tests.tiny_models import LLAMA, write_byte_tokenizer, write_model
from tests.warm import WarmPython

Run = Callable[..., None]

IMPORTS = """
import faulthandler
faulthandler.enable()
import asyncio, copy, gc, os, pickle, signal, sys, threading, warnings
from concurrent.futures import ThreadPoolExecutor
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.errors import EngineError
from brlite.llm import LLM, AsyncEngine
from brlite.sampling_params import SamplingParams

"""
PRELUDE = """
folder, backend = sys.argv[1:]
spec = ModelSpec(name="tiny", path=folder, build_seq=512, build_batch=4)
config = Config(model=(spec,), engine=EngineConfig(backend=backend, device="cpu", threads=2))
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)

def text(output):
    return output.outputs[0].text

def refused(call, kind, words):
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_model(tmp_path_factory.mktemp("models") / "tiny", {**LLAMA, "max_position_embeddings": 512})
    write_byte_tokenizer(path)
    return path


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a script with the folder and the backend, in a process that must end well."""
    python = WarmPython(
        IMPORTS + "import brlite.backends.native.backend\n" + "import brlite.backends.torch.backend\n" * HAS_TORCH
    )

    def run(script: str, folder: Path, backend: str = "native") -> None:
        done = python.run(PRELUDE + textwrap.dedent(script), folder, backend)
        assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"

    yield run
    python.close()


def test_threads_that_share_a_model_each_get_their_own_texts(run: Run, folder: Path, backend: str) -> None:
    run(
        """
        prompts = [f"prompt number {number}" for number in range(12)]
        with LLM(config=config) as llm:
            alone = [text(llm.generate(prompt, GREEDY)[0]) for prompt in prompts]
            with ThreadPoolExecutor(4) as pool:
                together = list(pool.map(lambda prompt: text(llm.generate(prompt, GREEDY)[0]), prompts * 2))
        assert together == alone * 2
        """,
        folder,
        backend,
    )


def test_closing_waits_for_the_step_and_the_other_thread_ends_with_closed(run: Run, folder: Path, backend: str) -> None:
    run(
        """
        for _ in range(3):
            llm, has_begun = LLM(config=config), threading.Event()
            def generate():
                llm.generate(["one", "two", "three"] * 40, LONG, on_finished=lambda *_: has_begun.set())
            def wait_for_its_turn():
                has_begun.wait()
                llm.generate("another", GREEDY)
            with ThreadPoolExecutor(2) as pool:
                calls = [pool.submit(generate), pool.submit(wait_for_its_turn)]
                has_begun.wait()
                llm.close()
                for call in calls:
                    refused(call.result, EngineError, "the LLM is closed")
            refused(lambda: llm.generate("x", GREEDY), EngineError, "the LLM is closed")
        """,
        folder,
        backend,
    )


def test_a_callback_that_generates_is_refused_and_one_that_closes_closes(run: Run, folder: Path) -> None:
    run(
        """
        llm = LLM(config=config)
        def nest(*_):
            llm.generate("y", GREEDY)
        refused(lambda: llm.generate("x", GREEDY, on_finished=nest), RuntimeError, "inside a callback")
        assert text(llm.generate("x", GREEDY)[0])
        refused(lambda: llm.generate(["x"] * 20, GREEDY, on_finished=lambda *_: llm.close()), EngineError, "closed")
        """,
        folder,
    )


def test_a_signal_handler_that_closes_on_the_thread_of_the_step_does_not_hang(
    run: Run, folder: Path, backend: str
) -> None:
    run(
        """
        llm = LLM(config=config)
        signal.signal(signal.SIGALRM, lambda *_: llm.close())
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        refused(lambda: llm.generate(["x"] * 400, LONG), EngineError, "closed")
        """,
        folder,
        backend,
    )


def test_steps_of_two_threads_and_after_close_never_reach_freed_memory(run: Run, folder: Path, backend: str) -> None:
    run(
        """
        from brlite.engine.backend import Batch, SamplingInput, ScheduledSeq
        from brlite.llm import build_engine
        def step(thread):
            sampling = SamplingInput(GREEDY, 0, 0)
            seq = ScheduledSeq(thread, 0, [5 + thread] * 40, [4 * thread, 4 * thread + 1, 4 * thread + 2], sampling)
            return built.backend.execute(Batch([seq])).seqs[0].tokens[0].token_id
        built = build_engine(config)
        alone = [step(thread) for thread in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(step, [0, 1, 2, 3] * 30)) == alone * 30
            def until_closed(thread):
                while True:
                    assert step(thread) == alone[thread]
            calls = [pool.submit(until_closed, thread) for thread in range(4)]
            threading.Event().wait(0.1)
            built.backend.close()
            built.backend.close()
            for call in calls:
                refused(call.result, EngineError, "the backend is closed")
        """,
        folder,
        backend,
    )


def test_ctrl_c_while_a_model_loads_ends_its_threads_before_their_memory(run: Run, tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "head_dim": 64}
    folder = write_model(tmp_path / "larger", config | {"max_position_embeddings": 512})
    write_byte_tokenizer(folder)
    run(
        """
        from time import monotonic
        def interrupt(*_):
            shots.pop()
            if not shots:
                signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        begin = monotonic()
        LLM(config=config).close()
        seconds = monotonic() - begin
        num_interrupted = 0
        for number in range(9):
            shots = [1, 2]  # the second comes, if it does, while the first one's threads are waited for
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, seconds * (number + 1) / 10, seconds / 50)
                    LLM(config=config).close()
                except KeyboardInterrupt:
                    num_interrupted += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
        assert num_interrupted > 2, num_interrupted
        with LLM(config=config) as llm:
            assert text(llm.generate("x", GREEDY)[0])
        """,
        folder,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_is_told_that_the_model_is_its_parents(run: Run, folder: Path, backend: str) -> None:
    run(
        """
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork beside threads
        llm = LLM(config=config)
        before = text(llm.generate("x", GREEDY)[0])
        with llm._turn:  # as if another thread were generating at the moment of the fork
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                refused(lambda: llm.generate("x", GREEDY), EngineError, "forked child")
                llm.close()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert text(llm.generate("x", GREEDY)[0]) == before
        llm.close()
        """,
        folder,
        backend,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize(("leave", "status"), [("sys.exit(7)", 7), ("await asyncio.sleep(0)", 1)])
def test_a_child_that_is_forked_in_a_running_loop_ends_as_it_says(
    run: Run, folder: Path, leave: str, status: int
) -> None:
    run(
        f"""
        async def main():
            async with AsyncEngine.from_config(config):
                child = os.fork()
                if child == 0:
                    signal.alarm(60)
                    {leave}
                    raise ValueError("the child is done")
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == {status}
                os._exit(0)  # the child has closed the loop that both have: asyncio's end in a child is not safe

        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.run(main())
        """,
        folder,
    )


def test_what_is_dropped_without_close_is_given_back_with_a_warning(run: Run, folder: Path, backend: str) -> None:
    run(
        """
        closed = []
        def watch(backend):
            give_back = type(backend).close
            type(backend).close = lambda self: (closed.append(self), give_back(self))
        warnings.simplefilter("always")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            llm = LLM(config=config)
            watch(llm._backend)
            llm.generate("x", GREEDY)
            del llm
            gc.collect()
            assert len(closed) == 1
            async def drop():
                engine = await AsyncEngine.load(config)
                async for _ in engine.generate("x", GREEDY):
                    pass
                del engine
                for _ in range(100):  # the thread and the task of the last step let go of it in turns of the loop
                    await asyncio.sleep(0.02)
                    gc.collect()
                    if len(closed) == 2:
                        break
                assert len(closed) == 2
            asyncio.run(drop())
        dropped = [str(each.message) for each in caught if "dropped without close" in str(each.message)]
        assert len(dropped) == 2, dropped
        with LLM(config=config) as llm:
            pass
        del llm
        gc.collect()
        """,
        folder,
        backend,
    )


def test_another_event_loop_is_told_at_once_which_one_the_engine_belongs_to(run: Run, folder: Path) -> None:
    run(
        """
        async def load():
            return await AsyncEngine.load(config)
        async def collect(engine):
            return [output async for output in engine.generate("x", GREEDY)]
        engine = asyncio.run(load())
        refused(lambda: asyncio.run(collect(engine)), RuntimeError, "which is closed")
        refused(lambda: asyncio.run(engine.prompts.encode("x")), RuntimeError, "event loop")
        refused(lambda: asyncio.run(engine.start()), RuntimeError, "event loop")
        refused(lambda: asyncio.run(engine.wait_idle()), RuntimeError, "event loop")
        asyncio.run(engine.close())
        asyncio.run(engine.close())

        async def from_two_loops():
            async with await AsyncEngine.load(config) as engine:
                other = asyncio.to_thread(asyncio.run, collect(engine))
                try:
                    await other
                except RuntimeError as error:
                    assert "which is another one" in str(error), error
                else:
                    raise AssertionError("another loop was served")
                assert await collect(engine)
        asyncio.run(from_two_loops())
        """,
        folder,
    )


def test_starting_a_running_engine_again_does_nothing(folder: Path) -> None:
    script = """
        async def twice():
            async with await AsyncEngine.load(config) as engine:
                await engine.start()
                outputs = [output async for output in engine.generate("x", GREEDY)]
                assert outputs[-1].finished
                assert len([task for task in asyncio.all_tasks() if task.get_name() == "brlite-engine"]) == 1
            try:
                await engine.start()
            except EngineError as error:
                assert "cannot be started again" in str(error)
            else:
                raise AssertionError("a closed engine was started")
        asyncio.run(twice())
        """
    command = [sys.executable, "-O", "-c", IMPORTS + PRELUDE + textwrap.dedent(script), str(folder), "native"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)

    assert done.returncode == 0, done.stderr[-4000:]


def test_pickling_and_copying_say_that_a_loaded_model_cannot_be_sent(run: Run, folder: Path, backend: str) -> None:
    run(
        """
        def check(value, words):
            for act in (pickle.dumps, copy.copy, copy.deepcopy):
                refused(lambda: act(value), TypeError, words)
        with LLM(config=config) as llm:
            check(llm, "an LLM cannot be pickled")
            check(llm._backend._guard, "a backend cannot be pickled")
        async def pickle_async():
            async with AsyncEngine.from_config(config) as engine:
                check(engine, "an AsyncEngine cannot be pickled")
        asyncio.run(pickle_async())
        assert pickle.loads(pickle.dumps((config, GREEDY))) == (config, GREEDY)
        """,
        folder,
        backend,
    )
