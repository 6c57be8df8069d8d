"""The checks of `brlite engine-check`. Each tests one promise of the contract, and fails if the engine breaks it.

A check gets the engine with all slots empty, and may leave it in any state. The checks do not test the mathematics:
an engine that computes another model passes them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import numpy as np

from brlite.backends.plugins.calls import find_fault, with_every_slot
from brlite.backends.plugins.conformance.engine_under_test import CheckFailed, EngineUnderTest, Logit, NotApplicable
from brlite.backends.plugins.contract import GivesHiddenStates, PluginRow, TokenIds

Check = Callable[[EngineUnderTest], str]

SHORT, MIDDLE, LONG = 5, 17, 40
RAGGED = (1, 2, 3, 7, 16, 17, 31, 64)
NUM_REPEATS = 3


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one check. `detail` is what was measured, or why the check did not run."""

    name: str
    result: Literal["passed", "failed", "not tried"]
    detail: str
    seconds: float


def run_checks(subject: EngineUnderTest, report: Callable[[Outcome], object]) -> list[Outcome]:
    """Run all checks in order. `report` gets each outcome at once."""
    outcomes = []
    for name, check in CHECKS.items():
        outcomes.append(run_check(subject, name, check))
        report(outcomes[-1])
    return outcomes


def run_check(subject: EngineUnderTest, name: str, check: Check) -> Outcome:
    """Run one check, with empty slots at its start. Any exception of the engine becomes an outcome."""
    start = time.monotonic()
    result: Literal["passed", "failed", "not tried"]
    try:
        subject.clear()
        result, detail = "passed", check(subject)
    except NotApplicable as reason:
        result, detail = "not tried", str(reason)
    except CheckFailed as failure:
        result, detail = "failed", str(failure)
    except Exception as error:  # third-party code: any exception is a finding
        result, detail = "failed", f"raised {type(error).__name__}: {error}"
    return Outcome(name=name, result=result, detail=detail, seconds=time.monotonic() - start)


def logits_have_their_form(subject: EngineUnderTest) -> str:
    for length in (1, SHORT):
        rows = with_every_slot([subject.row(0, _one_row(subject, length))], subject.capabilities)
        shape = (len(rows), subject.capabilities.vocab_size)
        if fault := find_fault(subject.engine.step(rows), subject.capabilities.logits_dtype, shape):
            raise CheckFailed(f"logits are {fault}")
        subject.release(0)
    return f"{subject.capabilities.logits_dtype} [rows, {subject.capabilities.vocab_size}]"


def logits_are_finite(subject: EngineUnderTest) -> str:
    for length in RAGGED:
        logits = subject.alone(0, subject.prompt(length))
        if not np.isfinite(logits).all():
            raise CheckFailed(f"after a prompt of {length} tokens some logits are not finite")
        subject.release(0)
    return f"after prompts of {RAGGED[0]} to {RAGGED[-1]} tokens"


def logits_stay_as_they_are(subject: EngineUnderTest) -> str:
    kept = subject.alone(0, subject.prompt(SHORT))
    before = kept.copy()
    subject.alone(0, subject.prompt(1))
    if not np.array_equal(kept, before):
        raise CheckFailed("a later step wrote into the logits of an earlier one")
    return "a later step does not touch them"


def every_token_counts(subject: EngineUnderTest) -> str:
    prompt = subject.prompt(MIDDLE)
    expected = _fresh(subject, prompt)
    for index in (0, len(prompt) // 2, len(prompt) - 1):
        other = [*prompt]
        other[index] = (other[index] + 1) % subject.capabilities.vocab_size
        if np.array_equal(_fresh(subject, other), expected):
            raise CheckFailed(f"another token at position {index} of {len(prompt)} changes nothing")
    if np.array_equal(_fresh(subject, [*prompt[1::-1], *prompt[2:]]), expected) and prompt[0] != prompt[1]:
        raise CheckFailed("the order of the first two tokens changes nothing")
    return "the first, one in the middle, the last, and their order"


def hidden_states_are_those_of_the_last_token(subject: EngineUnderTest) -> str:
    subject.need("hidden_size")
    shape = (1, subject.capabilities.hidden_size)
    engine = subject.engine
    if not isinstance(engine, GivesHiddenStates):
        raise CheckFailed("it has a hidden_size, and no method hidden_states")
    prompt, states = subject.prompt(LONG), []
    for sizes in ([len(prompt)], [len(prompt) - 3, 1, 2]):
        subject.clear()
        _in_pieces(subject, prompt, sizes)
        states.append(engine.hidden_states([0]))
        if fault := find_fault(states[-1], "float32", shape):
            raise CheckFailed(f"hidden states are {fault}")
    subject.same("the whole prompt and its pieces", states[1][0], states[0][0])
    subject.clear()
    _fresh(subject, prompt[:-1])
    if np.array_equal(engine.hidden_states([0]), states[0]):
        raise CheckFailed("without its last token a prompt has the same hidden state")
    return f"float32 [slots, {shape[1]}], the same in pieces"


def decodes_continue_prompts(subject: EngineUnderTest) -> str:
    prompt = subject.prompt(LONG)
    expected = _fresh(subject, prompt)
    found = _in_pieces(subject, prompt, [len(prompt) - 3, 1, 1, 1])
    return _seen(subject.same("3 decodes after a prompt", found, expected))


def chunks_equal_the_whole(subject: EngineUnderTest) -> str:
    subject.need("can_chunk_prompts")
    prompt = subject.prompt(LONG)
    expected, differences = _fresh(subject, prompt), []
    for size in (1, 2, 3, 16, 23):
        sizes = [min(size, len(prompt) - start) for start in range(0, len(prompt), size)]
        found = _in_pieces(subject, prompt, sizes)
        differences.append(subject.same(f"chunks of {size}", found, expected))
    return _seen(*differences)


def the_same_again(subject: EngineUnderTest) -> str:
    prompts = {slot: subject.prompt(LONG, salt=slot) for slot in range(min(4, subject.capabilities.max_seqs))}
    first, differences = subject.feed(prompts), []
    for _ in range(NUM_REPEATS):
        subject.clear()
        found = subject.feed(prompts)
        differences += [subject.same("once more", found[slot], first[slot], is_repeated=True) for slot in prompts]
    return _seen(*differences)


def slots_are_alike(subject: EngineUnderTest) -> str:
    subject.need_two_slots()
    prompt = subject.prompt(MIDDLE)
    expected = _fresh(subject, prompt)
    differences = []
    for slot in range(1, subject.capabilities.max_seqs):
        found = subject.alone(slot, prompt)
        differences.append(subject.same(f"slot {slot} and slot 0", found, expected))
        subject.release(slot)
    return _seen(*differences)


def slots_are_isolated(subject: EngineUnderTest) -> str:
    subject.need_two_slots()
    prompt, last = subject.prompt(MIDDLE), subject.capabilities.max_seqs - 1
    first, differences = _fresh(subject, prompt, 7), []
    for salt in (1, 2):
        subject.clear()
        subject.feed({slot: subject.prompt(LONG, salt=100 * salt + slot) for slot in range(last)})
        subject.alone(last, prompt)
        then = subject.feed({slot: [7] for slot in range(last + 1)})[last]
        differences.append(subject.same("alone and in a full house", then, first))
    return _seen(*differences)


def ragged_prompts_do_not_mix(subject: EngineUnderTest) -> str:
    subject.need_two_slots()
    prompts = {slot: subject.prompt(RAGGED[slot % 8], salt=slot) for slot in range(subject.capabilities.max_seqs)}
    expected = {slot: _fresh(subject, prompt, 3) for slot, prompt in prompts.items()}
    subject.clear()
    subject.feed(prompts)
    found = subject.feed({slot: [3] for slot in prompts})
    return _seen(*(subject.same(f"slot {slot}", found[slot], expected[slot]) for slot in prompts))


def idle_slots_keep_what_they_hold(subject: EngineUnderTest) -> str:
    subject.need_two_slots()
    prompt = subject.prompt(MIDDLE)
    expected = _fresh(subject, prompt, 7)
    subject.alone(0, prompt)
    for slot in range(1, subject.capabilities.max_seqs):
        subject.alone(slot, subject.prompt(LONG, salt=slot))
        subject.alone(slot, [1])
    return _seen(subject.same("after steps of others", subject.alone(0, [7]), expected))


def the_order_of_rows_is_free(subject: EngineUnderTest) -> str:
    subject.need_two_slots()
    if subject.capabilities.needs_every_slot:
        raise NotApplicable("needs_every_slot: rows are in the order of slots")
    slots = range(min(4, subject.capabilities.max_seqs))
    results = []
    for order in (slots, reversed(slots)):
        subject.clear()
        for slot in slots:
            subject.alone(slot, subject.prompt(SHORT, salt=slot))
        results.append(subject.step([subject.row(slot, [slot]) for slot in order]))
    return _seen(*(subject.same(f"slot {slot}", results[1][slot], results[0][slot]) for slot in slots))


def prompts_and_decodes_mix(subject: EngineUnderTest) -> str:
    subject.need("can_mix_rows")
    subject.need_two_slots()
    first, second = subject.prompt(MIDDLE, salt=1), _one_row(subject, SHORT, salt=2)
    decoded, prefilled = _fresh(subject, first, 7), _fresh(subject, second)
    subject.alone(0, first)
    found = subject.step([subject.row(0, [7]), subject.row(1, second)])
    return _seen(
        subject.same("the decode beside a prompt", found[0], decoded),
        subject.same("the prompt beside a decode", found[1], prefilled),
    )


def prompts_come_together(subject: EngineUnderTest) -> str:
    subject.need("can_prefill_together")
    subject.need_two_slots()
    slots = range(min(4, subject.capabilities.max_seqs))
    prompts = {slot: _one_row(subject, RAGGED[3 + slot], salt=slot) for slot in slots}
    expected = {slot: _fresh(subject, prompt) for slot, prompt in prompts.items()}
    found = subject.step([subject.row(slot, prompt) for slot, prompt in prompts.items()])
    return _seen(*(subject.same(f"slot {slot}", found[slot], expected[slot]) for slot in prompts))


def a_released_slot_is_clean(subject: EngineUnderTest) -> str:
    prompt = subject.prompt(SHORT)
    expected = _fresh(subject, prompt, 7)
    for salt in range(NUM_REPEATS):
        subject.alone(0, subject.prompt(LONG, salt=salt))
        subject.alone(0, [1])
        subject.release(0)
        subject.alone(0, prompt)
        found = subject.alone(0, [7])
        subject.same("a short prompt after a long one", found, expected)
        subject.release(0)
    return f"{NUM_REPEATS} times"


def a_release_leaves_others_alone(subject: EngineUnderTest) -> str:
    subject.need_two_slots()
    prompt, others = subject.prompt(MIDDLE), range(1, subject.capabilities.max_seqs)
    expected = _fresh(subject, prompt, 7)
    subject.alone(0, prompt)
    for slot in others:
        subject.alone(slot, subject.prompt(SHORT, salt=slot))
    for slot in others:
        subject.release(slot)
    return _seen(subject.same("after others left", subject.alone(0, [7]), expected))


def a_release_may_come_at_any_time(subject: EngineUnderTest) -> str:
    last = subject.capabilities.max_seqs - 1
    subject.reopen(is_new=False)
    subject.release(last)
    subject.alone(last, subject.prompt(1))
    subject.release(last)
    subject.release(last)
    return "of a slot never used, and twice"


def a_slot_is_filled_and_no_further(subject: EngineUnderTest) -> str:
    limit = subject.capabilities.max_model_len
    whole = [*subject.prompt(LONG), *([1] * limit)][:limit]
    subject.alone(0, whole[:-1])
    logits = subject.alone(0, whole[-1:])
    if not np.isfinite(logits).all():
        raise CheckFailed(f"at position {limit - 1}, the last, some logits are not finite")
    subject.expect_refusal(f"token {limit + 1} of {limit}", [subject.row(0, [1])])
    subject.release(0)
    subject.alone(0, subject.prompt(SHORT))
    return f"{limit} tokens, and one more is refused"


def what_is_wrong_is_refused(subject: EngineUnderTest) -> str:
    subject.alone(0, subject.prompt(SHORT))
    length, limits = subject.lengths[0], subject.capabilities
    rows = {
        "a start before the slot's end": PluginRow(0, length - 1, _ids(1)),
        "a start behind the slot's end": PluginRow(0, length + 1, _ids(1)),
        "a token id of the vocabulary's size": PluginRow(0, length, _ids(limits.vocab_size)),
        "a negative token id": PluginRow(0, length, _ids(-1)),
    }
    for what, row in rows.items():
        subject.expect_refusal(what, [row])
    if not limits.needs_every_slot:
        subject.expect_refusal("a slot that is not there", [PluginRow(limits.max_seqs, 0, _ids(1))])
        subject.expect_refusal("a slot twice in a step", [PluginRow(0, length, _ids(1)), PluginRow(0, length, _ids(1))])
        return f"{len(rows) + 2} kinds of wrong rows"
    return f"{len(rows)} kinds of wrong rows"


def a_refusal_changes_nothing(subject: EngineUnderTest) -> str:
    subject.need_two_slots()
    prompt = subject.prompt(MIDDLE)
    expected = _fresh(subject, prompt, 7)
    subject.alone(0, prompt)
    subject.alone(1, prompt)
    wrong = PluginRow(1, subject.lengths[1] + 1, _ids(1))
    subject.expect_refusal("a step with one wrong row of two", [subject.row(0, [3]), wrong])
    found = subject.feed({0: [7], 1: [7]})
    return _seen(*(subject.same(f"slot {slot}", found[slot], expected) for slot in (0, 1)))


def it_opens_again_as_it_was(subject: EngineUnderTest) -> str:
    prompt = subject.prompt(MIDDLE)
    expected, differences = _fresh(subject, prompt), []
    for is_new in (False, True):
        subject.reopen(is_new=is_new)
        differences.append(subject.same("after a new start", subject.alone(0, prompt), expected, is_repeated=True))
    return _seen(*differences)


def it_closes_twice(subject: EngineUnderTest) -> str:
    subject.engine.close()
    subject.engine.close()
    subject.reopen(is_new=True)
    return "without a word"


CHECKS: dict[str, Check] = {
    check.__name__.replace("_", " "): check
    for check in (
        logits_have_their_form,
        logits_are_finite,
        logits_stay_as_they_are,
        every_token_counts,
        hidden_states_are_those_of_the_last_token,
        decodes_continue_prompts,
        chunks_equal_the_whole,
        the_same_again,
        slots_are_alike,
        slots_are_isolated,
        ragged_prompts_do_not_mix,
        idle_slots_keep_what_they_hold,
        the_order_of_rows_is_free,
        prompts_and_decodes_mix,
        prompts_come_together,
        a_released_slot_is_clean,
        a_release_leaves_others_alone,
        a_release_may_come_at_any_time,
        a_slot_is_filled_and_no_further,
        what_is_wrong_is_refused,
        a_refusal_changes_nothing,
        it_opens_again_as_it_was,
        it_closes_twice,
    )
}


def _one_row(subject: EngineUnderTest, length: int, *, salt: int = 0) -> list[int]:
    """A prompt that needs one row only."""
    return subject.prompt(min(length, subject.capabilities.longest_row), salt=salt)


def _fresh(subject: EngineUnderTest, prompt: Sequence[int], *then: int) -> Logit:
    """The logits after a prompt and the tokens `then`, decoded one by one, alone in slot 0. Slot 0 is emptied after."""
    subject.clear()
    logits = subject.alone(0, prompt)
    for token_id in then:
        logits = subject.alone(0, [token_id])
    subject.release(0)
    return logits


def _in_pieces(subject: EngineUnderTest, prompt: Sequence[int], sizes: Sequence[int]) -> Logit:
    """The logits after a prompt that is split into rows of these sizes."""
    subject.clear()
    start = 0
    for size in sizes:
        logits = subject.alone(0, prompt[start : start + size])
        start += size
    return logits


def _ids(token_id: int) -> TokenIds:
    return np.array([token_id], np.int32)


def _seen(*differences: float) -> str:
    largest = max(differences)
    return f"largest difference {largest:.2g}" if largest else "the same bits"
