"""The sequences of requests with beam search: assigns a sequence to each beam and to each final answer.

`BeamSearch` ranks beams and answers, without sequences. The engine decides when a search continues or ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from brlite.engine.beam_search import BeamSearch, Hypothesis
from brlite.engine.request import RequestState, Sequence
from brlite.engine.scheduler import Scheduler


class BeamSequences:
    """Gives each beam of a search a sequence, which the scheduler runs."""

    def __init__(
        self,
        scheduler: Scheduler,
        vocab_size: int,
        seq_ids: Iterator[int],
        add_sequence: Callable[[RequestState], Sequence],
    ) -> None:
        """`add_sequence` makes a new sequence of a request's prompt, with one of `seq_ids`, and does not queue it."""
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._seq_ids = seq_ids
        self._add_sequence = add_sequence

    def begin(self, state: RequestState) -> Sequence:
        """Start a request's search. Returns the sequence that computes its prompt, which is not queued.

        The request's parameters then ask for as many logprobs as the search needs of each step. Raises
        `InvalidRequest` where the model has fewer tokens than the search needs.
        """
        params = state.request.params
        search = BeamSearch(params, state.max_tokens, state.ends)
        search.check_vocabulary(self._vocab_size)
        state.search = search
        params = msgspec.structs.replace(params, logprobs=search.num_logprobs)
        state.request = msgspec.structs.replace(state.request, params=params)
        seq = self._add_sequence(state)
        search.go_on({seq.seq_id: Hypothesis(seq.detokenizer)})
        return seq

    def advance(self, state: RequestState, search: BeamSearch, now: float) -> None:
        """Continue a request's beams once the best tokens after each of them are known.

        Until then, beams whose tokens are known release their place and blocks, so that two searches never deadlock.
        The last place stays with the search: else searches would take turns, and with few blocks compute their prompts
        again in each of them.
        The first continuation of a beam stays in its sequence. The others get the sequences of beams that are not
        continued, which share the blocks of the prompt already. If those are too few, they get new sequences, which
        find the full blocks in the prefix cache.
        """
        if not search.is_complete:
            for seq in state.sequences:
                if search.has_drawn(seq.seq_id) and seq.status == "running":
                    self._scheduler.hand_over(seq, state.sequences)
            return
        continuations = search.advance()
        if not continuations:
            self.end(state, search, now)
            return
        parents = {seq.seq_id: seq for seq in state.sequences}
        continued = {seq_id for seq_id, _ in continuations}
        running = [seq for seq in state.sequences if seq.status == "running"]
        unused = [seq for seq in running if seq.seq_id not in continued]
        state.sequences, beams, added = [], dict[int, Hypothesis](), list[Sequence]()
        for seq_id, hypothesis in continuations:
            seq = parent = parents[seq_id]
            is_running = parent in running
            if is_running and seq_id not in beams:
                seq.append(hypothesis.token_ids[-1])
                state.sequences.append(seq)
            elif is_running and unused:
                seq = unused.pop()
                seq.seq_id = next(self._seq_ids)  # for backends it is another sequence
                seq.token_ids[seq.num_prompt_tokens :] = hypothesis.token_ids
                self._scheduler.fork(seq, parent)
                state.sequences.append(seq)
            else:
                seq = self._add_sequence(state)
                seq.token_ids += hypothesis.token_ids
                seq.block_digests = parent.block_digests.copy()
                seq.steps_saved = parent.steps_saved
                added.append(seq)
            beams[seq.seq_id] = hypothesis
        search.go_on(beams)
        self._scheduler.add_siblings(added)
        for seq in unused:
            self._scheduler.hand_over(seq, state.sequences)

    def end(self, state: RequestState, search: BeamSearch, now: float) -> None:
        """End a search and add its best answers to the request's delta. Their sequences replace those of the beams."""
        for seq in state.sequences:
            self._scheduler.finish(seq)
        state.sequences = []
        for index, found in enumerate(search.best()):
            seq = self._add_sequence(state)
            seq.token_ids += found.token_ids
            seq.status, seq.finish_reason = "finished", found.finish_reason
            seq.first_token_time, seq.last_token_time = state.prompt_done_time or now, now
            state.add_delta(search.completion(index, found))
        state.output.finished, state.output.num_searched_tokens = True, search.num_tokens
