"""Messages between the ranks of a model: frames of msgpack over a stream socket. Knows no tensors and no torch.

A step goes to the ranks through here and not by a broadcast of their group: a write to a socket that sleeps there takes
some ten microseconds, a broadcast two barriers of all ranks; and the end of a socket shows that the other side is gone.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

import msgspec

from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Batch
from brlite.errors import RankGone

LENGTH_BYTES = 4
NIL = b"\xc0"  # msgpack's None
MAX_BYTES = 2**28  # far more than any batch: a longer frame is not one of ours


class Setup(msgspec.Struct, frozen=True, tag=True):
    """To a rank, first: what to load. `model_kind` shows whether a rank finds the same model.

    With native kernels `memory` is the open file that the ranks share, and `packed_file` where packed weights are kept.
    """

    rank: int
    spec: ModelSpec
    engine: EngineConfig
    model_kind: str
    memory: int | None = None
    packed_file: str | None = None


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """From a rank: weights and cache are in memory, of so many bytes."""

    weight_bytes: int
    kv_bytes: int
    fingerprint: str


class Join(msgspec.Struct, frozen=True, tag=True):
    """To a rank, when all are loaded: where they meet from then on."""

    place: str


class Joined(msgspec.Struct, frozen=True, tag=True):
    """From a rank: it is there."""


class Compute(msgspec.Struct, frozen=True, tag=True):
    """To a rank: one step, a `Batch` as msgpack. No answer; the ranks meet in the step itself."""

    batch: msgspec.Raw


class Stop(msgspec.Struct, frozen=True, tag=True):
    """To a rank: close the model and exit."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """From a rank of another machine, first: which it is, and the proof that it may (`rank_secret.py`)."""

    rank: int
    proof: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """From a rank, last: why it ends.

    `is_foreseen` where the message is fit for a user, `is_consequence` where the rank ends because another one is gone.
    """

    message: str
    is_foreseen: bool
    is_consequence: bool = False


Message = Setup | Loaded | Join | Joined | Compute | Stop | Hello | Failed


class RankSeq(msgspec.Struct, frozen=True, array_like=True):
    """What a rank reads of a `ScheduledSeq`. How its token is drawn is rank 0's business, and slow to decode."""

    seq_id: int
    start: int
    token_ids: list[int]
    block_table: list[int]
    sampling: msgspec.Raw = msgspec.Raw(NIL)
    prompt_targets: list[int] = []
    num_prompt_logprobs: int = 0
    num_draft_tokens: int = 0

    @property
    def is_drawn(self) -> bool:
        """Whether a token is wanted after its last one."""
        return bytes(self.sampling) != NIL


class RankBatch(msgspec.Struct, frozen=True, array_like=True):
    """What a rank reads of a `Batch`."""

    seqs: list[RankSeq]


_WORK = msgspec.msgpack.Decoder(RankBatch)


class ChannelClosed(RankGone):
    """The other side is gone."""


class Channel:
    """One end. `send` and `receive` may be called from two threads, each of them from one."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._decoder = msgspec.msgpack.Decoder(Message)

    def send(self, message: Message) -> None:
        self.send_frame(frame(message))

    def send_frame(self, data: bytes) -> None:
        """Send what `frame` made, as it can be sent to several."""
        try:
            self.stream.sendall(data)
        except OSError as error:
            raise ChannelClosed(f"the connection is closed: {error.strerror}") from error

    def receive(self, max_bytes: int = MAX_BYTES) -> Any:
        """The next message, however long it takes. Raises `ChannelClosed` where none will come, or a larger one."""
        size = int.from_bytes(self._read(LENGTH_BYTES), "little")
        if size > max_bytes:
            raise ChannelClosed(f"a message of {size} bytes is none")
        try:
            return self._decoder.decode(self._read(size))
        except msgspec.MsgspecError as error:
            raise ChannelClosed(f"a message that is none: {error}") from error

    def shut(self) -> None:
        """Both sides find it closed, whatever they are doing with it. May be called twice, by any thread."""
        with suppress(OSError):  # the other side was first
            self.stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back, when no other thread uses it. May be called twice."""
        self.shut()
        self.stream.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, num_read = memoryview(data), 0
        while num_read < size:
            try:
                count = self.stream.recv_into(view[num_read:])
            except OSError as error:
                raise ChannelClosed(f"the connection is closed: {error.strerror}") from error
            if count == 0:
                raise ChannelClosed("the connection is closed")
            num_read += count
        return data


def read_work(message: Compute) -> RankBatch:
    """The step that a rank has to do its part of."""
    return _WORK.decode(message.batch)


def compute_frame(batch: Batch) -> bytes:
    """A step as it goes over the wire, the same bytes to every rank. Masks stay here: only rank 0 draws."""
    return frame(Compute(msgspec.Raw(msgspec.msgpack.encode(Batch(batch.seqs)))))


def frame(message: Message) -> bytes:
    """A message as it goes over the wire."""
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data
