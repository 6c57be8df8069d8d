"""A weight, from `load_backend` to its panels: the first tensor, and one that follows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from brlite.backends.choose import load_backend
from brlite.backends.native.library import find_library
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.config.options import EngineConfig, ModelSpec
from tests.journeys.recorder import Call, Journey, record
from tests.tiny_models import write_tiny_model


def journey() -> Journey:
    """The load until six tensors are packed. `process/machine.py` is left out: a call for each core and mount."""
    with TemporaryDirectory() as folder:
        path = write_tiny_model(Path(folder))
        spec = ModelSpec(name="tiny", path=str(path), precision="a_bf16_w_int8", build_seq=32, build_batch=1)
        checkpoint = open_checkpoint(path)
        model = check_model(checkpoint, spec)
        for _ in range(2):  # the first one imports
            with record(since=("backends/choose.py", "load_backend")) as recorded:
                load_backend(checkpoint, model, spec, EngineConfig(threads=1, backend="native")).close()
    calls = [call for call in recorded.calls if call.file != "process/machine.py"]
    return Journey(calls[: puts(calls)[6]])


def puts(calls: Sequence[Call]) -> list[int]:
    """Where each tensor is packed."""
    return [index for index, call in enumerate(calls) if call.function == "Packer.put"]


@pytest.mark.skipif(find_library() is None, reason="the native library is not built")
def test_a_weight_is_packed_in_few_calls():
    # Without `files/`: a library in the cache folder, rather than the installed one, takes its path and its owner.
    calls = [call for call in journey().calls if not call.file.startswith("files/")]
    begins = puts(calls)
    first = Journey(calls[: begins[1]])
    further = [Journey(calls[begin:end]) for begin, end in pairwise(begins[1:])]  # from one `put` to the next

    assert len(first.calls) <= 39  # 38 with the installed library; the last two of them fetch the second tensor
    assert len(first.files) <= 10
    assert max(len(tensor.calls) for tensor in further) <= 8
    assert max(len(tensor.files) for tensor in further) <= 3
