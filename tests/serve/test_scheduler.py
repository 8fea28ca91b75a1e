"""The scheduler's rules one at a time; test_scheduler_simulation.py runs them at random."""

from __future__ import annotations

from collections.abc import Sequence as Items

import pytest

from qserve.serve.block_manager import BlockManager
from qserve.serve.errors import BadRequest, ContextLengthExceeded
from qserve.serve.messages import FinishReason, SamplingParams
from qserve.serve.scheduler import Chunk, Limits, Scheduler
from qserve.serve.sequence import Sequence, SequenceStatus


def make_scheduler(
    num_blocks: int = 64, max_num_seqs: int = 8, budget: int = 32, max_model_len: int = 128
) -> Scheduler:
    limits = Limits(max_num_seqs, budget, max_model_len)
    return Scheduler(limits, BlockManager(num_blocks, block_size=4))


def make_sequence(name: str, num_prompt: int, max_tokens: int = 8) -> Sequence:
    return Sequence(name, tuple(range(num_prompt)), SamplingParams(max_tokens=max_tokens))


def run(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step with a model that always answers 7: the chunks as (name, start, end)."""
    chunks = scheduler.schedule()
    report = [(chunk.sequence.request_id, chunk.start, chunk.end) for chunk in chunks]
    compute(chunks)
    return report


def compute(chunks: Items[Chunk]) -> None:
    for chunk in chunks:
        samples = chunk.samples
        chunk.sequence.num_computed = chunk.end
        if samples:
            chunk.sequence.token_ids.append(7)


def test_a_short_prompt_is_computed_at_once_and_then_token_by_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 5))
    assert run(scheduler) == [("a", 0, 5)]
    assert run(scheduler) == [("a", 5, 6)]
    assert run(scheduler) == [("a", 6, 7)]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(budget=32)
    scheduler.add(make_sequence("a", 70))
    assert [run(scheduler) for _ in range(4)] == [
        [("a", 0, 32)],
        [("a", 32, 64)],
        [("a", 64, 70)],
        [("a", 70, 71)],
    ]


def test_only_the_chunk_that_reaches_the_last_token_samples() -> None:
    scheduler = make_scheduler(budget=32)
    scheduler.add(make_sequence("a", 40))
    (first,) = scheduler.schedule()
    assert not first.samples
    compute([first])
    (second,) = scheduler.schedule()
    assert second.samples
    assert second.num_tokens == 8


def test_running_requests_get_their_token_before_a_new_prompt_gets_the_rest() -> None:
    scheduler = make_scheduler(budget=32)
    scheduler.add(make_sequence("a", 3))
    scheduler.add(make_sequence("b", 3))
    run(scheduler)
    scheduler.add(make_sequence("long", 100))
    assert run(scheduler) == [("a", 3, 4), ("b", 3, 4), ("long", 0, 30)]
    assert run(scheduler) == [("a", 4, 5), ("b", 4, 5), ("long", 30, 60)]


def test_several_prompts_share_a_step() -> None:
    scheduler = make_scheduler(budget=32)
    for name, size in [("a", 10), ("b", 20), ("c", 30)]:
        scheduler.add(make_sequence(name, size))
    assert run(scheduler) == [("a", 0, 10), ("b", 0, 20), ("c", 0, 2)]


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    sequences = [make_sequence(name, 2) for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    assert [name for name, _, _ in run(scheduler)] == ["a", "b"]
    scheduler.finish(sequences[0], FinishReason.STOP)
    assert [name for name, _, _ in run(scheduler)] == ["b", "c"]


def test_a_prompt_gets_blocks_for_all_of_itself_when_it_starts() -> None:
    scheduler = make_scheduler(budget=32)
    sequence = make_sequence("a", 100)
    scheduler.add(sequence)
    run(scheduler)
    assert len(sequence.block_table) == 25


def test_a_prompt_that_does_not_fit_beside_the_running_ones_waits() -> None:
    scheduler = make_scheduler(num_blocks=10, max_model_len=40)
    first, second = make_sequence("a", 20), make_sequence("b", 20)
    scheduler.add(first)
    scheduler.add(second)
    assert [name for name, _, _ in run(scheduler)] == ["a"]  # the last blocks are kept for "a"
    scheduler.finish(first, FinishReason.STOP)
    assert [name for name, _, _ in run(scheduler)] == ["b"]


def test_nobody_overtakes_a_prompt_that_waits_for_blocks() -> None:
    scheduler = make_scheduler(num_blocks=10, max_model_len=40)
    for name, size in [("a", 20), ("big", 20), ("small", 1)]:
        scheduler.add(make_sequence(name, size))
    assert [name for name, _, _ in run(scheduler)] == ["a"]


def preempting_scheduler() -> tuple[Scheduler, Sequence, Sequence]:
    """Two sequences of two blocks each in a pool of 5; both need a third block in the next step."""
    scheduler = make_scheduler(num_blocks=5, max_model_len=20)
    first, second = make_sequence("a", 7, 10), make_sequence("b", 7, 10)
    scheduler.add(first)
    scheduler.add(second)
    run(scheduler)
    assert run(scheduler) == [("a", 7, 8), ("b", 7, 8)]
    return scheduler, first, second


def test_the_last_admitted_gives_up_its_blocks_when_they_run_out() -> None:
    scheduler, first, second = preempting_scheduler()
    assert run(scheduler) == [("a", 8, 9)]
    assert scheduler.num_preemptions == 1
    assert second.status is SequenceStatus.WAITING
    assert not second.block_table
    assert first.status is SequenceStatus.RUNNING


def test_a_preempted_sequence_computes_prompt_and_output_again() -> None:
    scheduler, first, second = preempting_scheduler()
    run(scheduler)
    scheduler.finish(first, FinishReason.LENGTH)
    assert second.num_output_tokens == 2
    assert run(scheduler) == [("b", 0, 9)]
    assert second.num_output_tokens == 3


def test_a_preempted_sequence_goes_before_those_that_never_ran() -> None:
    scheduler, first, _ = preempting_scheduler()
    scheduler.add(make_sequence("new", 1))
    run(scheduler)
    assert [sequence.request_id for sequence in scheduler.waiting] == ["b", "new"]
    scheduler.finish(first, FinishReason.STOP)
    assert [name for name, _, _ in run(scheduler)] == ["b", "new"]


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    scheduler, _, _ = preempting_scheduler()
    scheduler.add(make_sequence("new", 1))
    assert [name for name, _, _ in run(scheduler)] == ["a"]


def test_several_victims_keep_their_order() -> None:
    scheduler = make_scheduler(num_blocks=7, max_model_len=28)
    first = make_sequence("a", 7, 20)
    for sequence in (first, make_sequence("b", 3, 20), make_sequence("c", 3, 20)):
        scheduler.add(sequence)
    while scheduler.num_preemptions < 2:
        run(scheduler)
    assert [sequence.request_id for sequence in scheduler.waiting] == ["b", "c"]


def test_a_finished_sequence_gives_its_blocks_back() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence("a", 50)
    scheduler.add(sequence)
    run(scheduler)
    scheduler.finish(sequence, FinishReason.ABORT)
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert sequence.finish_reason is FinishReason.ABORT
    assert sequence.status is SequenceStatus.FINISHED
    assert scheduler.schedule() == []


def test_a_waiting_sequence_can_be_taken_out() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    first, second = make_sequence("a", 2), make_sequence("b", 2)
    scheduler.add(first)
    scheduler.add(second)
    run(scheduler)
    scheduler.finish(second, FinishReason.ABORT)
    assert not scheduler.waiting
    assert scheduler.running == [first]


def test_a_prompt_as_long_as_the_context_is_refused_with_both_numbers() -> None:
    scheduler = make_scheduler(max_model_len=64)
    with pytest.raises(ContextLengthExceeded, match=r"64 tokens.*context of 64"):
        scheduler.add(make_sequence("a", 64))
    scheduler.add(make_sequence("b", 63))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(BadRequest, match="no tokens"):
        make_scheduler().add(make_sequence("a", 0))


def test_a_request_larger_than_the_pool_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=8, max_model_len=128)  # the pool holds 32 tokens
    with pytest.raises(BadRequest, match=r"grow to 40 tokens.*holds only 32") as caught:
        scheduler.add(make_sequence("a", 20, max_tokens=20))
    assert caught.value.param == "max_tokens"
    scheduler.add(make_sequence("b", 20, max_tokens=12))


def test_a_sequence_describes_itself() -> None:
    assert repr(make_sequence("a", 3)) == "Sequence('a', waiting, 0 of 3 tokens computed, 0 blocks)"
