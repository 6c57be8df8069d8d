"""Messages between the ranks of a model: frames of msgpack over a stream socket. Contains no tensors and no torch.

Steps are sent over these sockets, not by a broadcast of torch's process group: a write to a socket takes some 10 µs, a
broadcast two barriers of all ranks. The end of a socket also shows that the other rank is gone.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

import msgspec

from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Batch, ScheduledSeq
from brlite.errors import RankGone

LENGTH_BYTES = 4
NIL = b"\xc0"  # msgpack's None
MAX_BYTES = 2**28  # far more than any batch has; a longer frame is an error


class Setup(msgspec.Struct, frozen=True, tag=True):
    """To a rank, first: what to load. `model_hash` is a hash by which the rank checks that it has the same model.

    With native kernels `memory` is the descriptor of the ranks' shared file, `packed_file` the path for packed weights.
    """

    rank: int
    spec: ModelSpec
    engine: EngineConfig
    model_hash: str
    memory: int | None = None
    packed_file: str | None = None


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """From a rank: weights and KV cache are loaded, with their sizes."""

    weight_bytes: int
    kv_bytes: int
    fingerprint: str


class Join(msgspec.Struct, frozen=True, tag=True):
    """To a rank, when all are loaded: the address of the process group to join."""

    place: str


class Joined(msgspec.Struct, frozen=True, tag=True):
    """From a rank: it has joined the process group."""


class Compute(msgspec.Struct, frozen=True, tag=True):
    """To a rank: one step, a `Batch` as msgpack. It has no answer; the step itself synchronizes the ranks."""

    batch: msgspec.Raw


class Stop(msgspec.Struct, frozen=True, tag=True):
    """To a rank: close the model and exit."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """From a rank that a launcher started, first: its number, and the proof that it has the secret (`secret.py`)."""

    rank: int
    proof: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """From a rank, last: why it ends.

    `is_foreseen`: the message is one of our errors, for users. `is_consequence`: it ends because another rank is gone.
    """

    message: str
    is_foreseen: bool
    is_consequence: bool = False


Message = Setup | Loaded | Join | Joined | Compute | Stop | Hello | Failed


class RankSeq(msgspec.Struct, frozen=True, array_like=True):
    """The fields of a `ScheduledSeq` that a rank decodes. Only rank 0 draws, so `sampling` stays encoded."""

    seq_id: int
    start: int
    token_ids: list[int]
    block_table: list[int]
    sampling: msgspec.Raw = msgspec.Raw(NIL)
    prompt_targets: list[int] = []
    num_prompt_logprobs: int = 0
    num_draft_tokens: int = 0

    @property
    def num_draws(self) -> int:
        """As in `ScheduledSeq`."""
        return 0 if bytes(self.sampling) == NIL else 1 + self.num_draft_tokens


class RankBatch(msgspec.Struct, frozen=True, array_like=True):
    """The fields of a `Batch` that a rank decodes."""

    seqs: list[RankSeq]


def drawing_rows(seq: ScheduledSeq | RankSeq, first_row: int) -> range:
    """The rows after which a run draws: the last real token's and those of its draft."""
    end = first_row + len(seq.token_ids)
    return range(end - seq.num_draws, end)


_WORK = msgspec.msgpack.Decoder(RankBatch)


class ChannelClosed(RankGone):
    """The connection to the other rank is closed."""


class Channel:
    """One end of a connection between ranks. One thread may call `send` while another calls `receive`."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._decoder = msgspec.msgpack.Decoder(Message)

    def send(self, message: Message) -> None:
        self.send_frame(frame(message))

    def send_frame(self, data: bytes) -> None:
        """Send the bytes of `frame`, which several ranks can get."""
        try:
            self.stream.sendall(data)
        except OSError as error:
            raise ChannelClosed(f"the connection is closed: {error.strerror}") from error

    def receive(self, max_bytes: int = MAX_BYTES) -> Any:
        """Wait for the next message, without a time limit. Raises `ChannelClosed`, also for an invalid message."""
        size = int.from_bytes(self._read(LENGTH_BYTES), "little")
        if size > max_bytes:
            raise ChannelClosed(f"a message has {size} bytes; allowed are {max_bytes}")
        try:
            return self._decoder.decode(self._read(size))
        except msgspec.MsgspecError as error:
            raise ChannelClosed(f"a message is invalid: {error}") from error

    def shut(self) -> None:
        """Shut down the connection for both sides, also during a call. May be called twice, by any thread."""
        with suppress(OSError):  # the other side has shut it down already
            self.stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, when no other thread uses it. May be called twice."""
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
    """Decode the step in a message."""
    return _WORK.decode(message.batch)


def compute_message(batch: Batch) -> Compute:
    """The message of a step, the same for every rank. Masks and processors are left out: only rank 0 draws."""
    return Compute(msgspec.Raw(msgspec.msgpack.encode(Batch(batch.seqs))))


def frame(message: Message) -> bytes:
    """The bytes of a message: its length, then its content."""
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data
