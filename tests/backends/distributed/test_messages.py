"""Messages between ranks: what arrives is what was sent, and an end is an end."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from brlite.backends.distributed.messages import (
    MAX_BYTES,
    Channel,
    ChannelClosed,
    Compute,
    Failed,
    Hello,
    Join,
    Joined,
    Loaded,
    Message,
    Setup,
    Stop,
    compute_message,
    frame,
    read_work,
)
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Batch, SamplingInput, ScheduledSeq, TokenMasks
from brlite.sampling_params import SamplingParams

MESSAGES: list[Message] = [
    Setup(3, ModelSpec(tensor_parallel=4, devices=(0, 1, 2, 3)), EngineConfig(threads=2), "kind", 7, "/a/b"),
    Loaded(10, 20, "print"),
    Join("127.0.0.1|5"),
    Joined(),
    Stop(),
    Hello(2, "token"),
    Failed("why", is_foreseen=True),
]
PARAMS = SamplingParams(temperature=0.7, stop=("a",), logit_bias={3: 1.5})


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    one, other = map(Channel, socket.socketpair())
    yield one, other
    one.close()
    other.close()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(channels: tuple[Channel, Channel], message: Message) -> None:
    channels[0].send(message)

    assert channels[1].receive() == message


def test_a_rank_reads_of_a_batch_all_but_how_tokens_are_drawn(channels: tuple[Channel, Channel]) -> None:
    drawn = ScheduledSeq(1, 40, [7, 8, 9], [4, 2], SamplingInput(PARAMS, 2**64 - 1, 3, b"ab", b"cd", (2,)))
    drawn = msgspec.structs.replace(drawn, num_draft_tokens=2)
    plain = ScheduledSeq(2, 0, [5, 6], [9], prompt_targets=[6], num_prompt_logprobs=3)
    channels[0].send(compute_message(Batch([drawn, plain], TokenMasks(100, {1: 3}))))

    message = channels[1].receive()
    assert isinstance(message, Compute)
    work = read_work(message)

    assert [seq.num_draws for seq in work.seqs] == [3, 0]
    for seq, piece in zip((drawn, plain), work.seqs, strict=True):
        for name in ("seq_id", "start", "token_ids", "block_table", "prompt_targets", "num_draft_tokens"):
            assert getattr(piece, name) == getattr(seq, name)


def test_messages_that_arrive_in_pieces_and_together_are_told_apart(channels: tuple[Channel, Channel]) -> None:
    batch = Batch([ScheduledSeq(number, 0, list(range(500)), [number]) for number in range(40)])
    frames = frame(compute_message(batch)) + frame(compute_message(Batch([])))
    for start in range(0, len(frames), 1000):
        channels[0].send_frame(frames[start : start + 1000])

    numbers = [len(read_work(channels[1].receive()).seqs) for _ in range(2)]

    assert numbers == [40, 0]


@pytest.mark.parametrize("sent", [b"", b"\x05\x00", b"\x05\x00\x00\x00abc"], ids=["nothing", "a length", "a part"])
def test_an_end_is_told_wherever_it_comes(channels: tuple[Channel, Channel], sent: bytes) -> None:
    channels[0].send_frame(sent)
    channels[0].close()

    with pytest.raises(ChannelClosed):
        channels[1].receive()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        pytest.param(b"\x03\x00\x00\x00abc", "is invalid", id="no message"),
        pytest.param((MAX_BYTES + 1).to_bytes(4, "little"), f"allowed are {MAX_BYTES}", id="too long"),
    ],
)
def test_what_is_no_message_ends_the_channel(channels: tuple[Channel, Channel], sent: bytes, reason: str) -> None:
    channels[0].send_frame(sent)

    with pytest.raises(ChannelClosed, match=reason):
        channels[1].receive()


def test_sending_to_nobody_is_told(channels: tuple[Channel, Channel]) -> None:
    channels[1].close()

    with pytest.raises(ChannelClosed):
        channels[0].send(Stop())
