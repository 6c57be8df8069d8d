"""When a completion ends, and what text its last token adds: EOS, stop token ids, stop strings, length."""

from __future__ import annotations

from brlite.engine.request import Sequence
from brlite.outputs import FinishReason


def interpret(
    seq: Sequence, token_id: int, eos_token_ids: tuple[int, ...]
) -> tuple[str, FinishReason | None, str | int | None]:
    """The text that the sequence's newest token releases, the finish reason if it ends here, and the stop reason.

    A token that stops adds no text of its own, unless `include_stop_str_in_output` asks for it.
    """
    params, detokenizer = seq.state.request.params, seq.detokenizer
    if token_id in params.stop_token_ids:
        text = detokenizer.push(token_id) if params.include_stop_str_in_output else ""
        return text + detokenizer.finish(), "stop", token_id
    if token_id in eos_token_ids and not params.ignore_eos:
        return detokenizer.finish(), "stop", None
    text = detokenizer.push(token_id)
    if detokenizer.stop_string is not None:
        return text, "stop", detokenizer.stop_string
    if seq.num_output_tokens >= seq.state.max_tokens:
        return text + detokenizer.finish(), "length", None
    return text, None, None
