"""The engine's bookkeeping, with a model that is scripted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qserve.serve.block_manager import BlockManager
from qserve.serve.engine import Engine, Output
from qserve.serve.errors import BadRequest, ContextLengthExceeded
from qserve.serve.messages import AddRequest, FinishReason, NewTokens, RequestFailed, SamplingParams
from qserve.serve.sampler import NO_TOKEN
from qserve.serve.scheduler import Chunk, Limits, Scheduler

VOCAB_SIZE = 32
EOS = 2


class CountingModel:
    """Answers every token ``t`` with ``t + 1``, modulo the vocabulary; fails when told to."""

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self.fails = False
        self.answers_nan_to: set[str] = set()

    def run(self, chunks: Items[Chunk]) -> NDArray[np.float32]:
        if self.fails:
            raise RuntimeError("out of memory at /secret/path")
        rows = [chunk for chunk in chunks if chunk.samples]
        logits = np.zeros((len(rows), VOCAB_SIZE), dtype=np.float32)
        for i, chunk in enumerate(rows):
            logits[i, (chunk.sequence.token_ids[-1] + 1) % VOCAB_SIZE] = 5.0
            if chunk.sequence.request_id in self.answers_nan_to:
                logits[i] = np.nan
        return logits

    def run_greedy(self, chunks: Items[Chunk]) -> list[int]:
        return [int(r.argmax()) if np.isfinite(r).all() else NO_TOKEN for r in self.run(chunks)]


def make_engine(model: CountingModel | None = None, num_blocks: int = 64) -> Engine:
    scheduler = Scheduler(Limits(4, 16, 64), BlockManager(num_blocks, 4))
    return Engine(model or CountingModel(), scheduler, frozenset({EOS}))


def request(name: str, prompt: tuple[int, ...] = (5, 6, 7), **params: Any) -> AddRequest:
    settings = {"max_tokens": 4, "temperature": 0.0} | params
    return AddRequest(name, prompt, SamplingParams(**settings), 0.0)


def drain(engine: Engine) -> list[Output]:
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    return outputs


def tokens_of(outputs: list[Output], name: str) -> list[int]:
    return [
        token
        for output in outputs
        if isinstance(output, NewTokens) and output.request_id == name
        for token in output.token_ids
    ]


def test_a_request_gets_its_tokens_one_a_step_and_ends_at_max_tokens() -> None:
    engine = make_engine()
    engine.add(request("a"))
    outputs = drain(engine)
    assert outputs == [
        NewTokens("a", (8,)),
        NewTokens("a", (9,)),
        NewTokens("a", (10,)),
        NewTokens("a", (11,), finish_reason=FinishReason.LENGTH),
    ]
    assert engine.step() == []


def test_an_end_of_sequence_token_ends_the_request_and_is_reported() -> None:
    engine = make_engine()
    engine.add(request("a", (0,)))
    assert drain(engine)[-1] == NewTokens("a", (EOS,), finish_reason=FinishReason.STOP)


def test_an_ignored_end_of_sequence_token_is_a_token_like_any_other() -> None:
    engine = make_engine()
    engine.add(request("a", (0,), ignore_eos=True))
    assert tokens_of(drain(engine), "a") == [1, 2, 3, 4]


def test_a_stop_token_ends_the_request_and_is_named() -> None:
    engine = make_engine()
    engine.add(request("a", stop_token_ids=(9,)))
    expected = NewTokens("a", (9,), finish_reason=FinishReason.STOP, stop_token_id=9)
    assert drain(engine)[-1] == expected


def test_min_tokens_puts_the_end_off() -> None:
    engine = make_engine()
    engine.add(request("a", (0,), min_tokens=3))
    outputs = drain(engine)
    assert EOS not in tokens_of(outputs, "a")[:3]


def test_the_context_ends_a_request_before_max_tokens_does() -> None:
    engine = make_engine()
    engine.add(request("a", (5,) * 60, max_tokens=100, ignore_eos=True))
    outputs = drain(engine)
    assert len(tokens_of(outputs, "a")) == 4  # 64 tokens in all
    assert outputs[-1] == NewTokens("a", (9,), finish_reason=FinishReason.LENGTH)


def test_logprobs_come_with_the_token() -> None:
    engine = make_engine()
    engine.add(request("a", num_logprobs=1, max_tokens=1))
    (output,) = drain(engine)
    assert isinstance(output, NewTokens)
    assert [entry.token_id for entry in output.logprobs] == [8]


def test_a_long_prompt_gives_its_first_token_after_its_last_chunk() -> None:
    engine = make_engine()
    engine.add(request("a", (5,) * 40))
    assert [len(engine.step()) for _ in range(3)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (request("a", (5, VOCAB_SIZE)), "prompt"),
        (request("a", (-1,)), "prompt"),
        (request("a", stop_token_ids=(VOCAB_SIZE,)), "stop_token_ids"),
        (request("a", logit_bias=((VOCAB_SIZE, 1.0),)), "logit_bias"),
        (request("a", ()), "prompt"),
    ],
)
def test_a_request_that_cannot_be_computed_is_refused(bad: AddRequest, param: str) -> None:
    engine = make_engine()
    with pytest.raises(BadRequest) as caught:
        engine.add(bad)
    assert caught.value.param == param
    assert not engine.has_work()


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(ContextLengthExceeded):
        make_engine().add(request("a", (5,) * 64))


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    engine = make_engine()
    engine.add(request("a"))
    with pytest.raises(BadRequest, match="in use"):
        engine.add(request("a"))
    drain(engine)
    engine.add(request("a"))


def test_an_aborted_request_gives_no_more_output_and_frees_its_blocks() -> None:
    engine = make_engine()
    engine.add(request("a", max_tokens=50))
    engine.add(request("b"))
    engine.step()
    engine.abort("a")
    assert not tokens_of(drain(engine), "a")
    assert engine.stats().kv_usage == 0.0


def test_aborting_an_unknown_request_does_nothing() -> None:
    engine = make_engine()
    before = engine.stats()
    engine.abort("nobody")
    assert engine.stats() == before


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = CountingModel()
    engine = make_engine(model)
    for i in range(6):  # 4 run, 2 wait
        engine.add(request(str(i)))
    model.fails = True
    with caplog.at_level(logging.CRITICAL):
        outputs = engine.step()
    assert [output.request_id for output in outputs] == ["0", "1", "2", "3"]
    assert all(isinstance(output, RequestFailed) for output in outputs)
    assert "secret" not in str(outputs)
    model.fails = False
    assert tokens_of(drain(engine), "5") == [8, 9, 10, 11]
    assert engine.stats().kv_usage == 0.0


def test_logits_that_are_not_numbers_fail_one_request_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = CountingModel()
    engine = make_engine(model)
    engine.add(request("sick"))
    engine.add(request("well"))
    model.answers_nan_to = {"sick"}
    with caplog.at_level(logging.CRITICAL):
        outputs = drain(engine)
    assert isinstance(outputs[0], RequestFailed)
    assert "not a number" in outputs[0].message
    assert tokens_of(outputs, "well") == [8, 9, 10, 11]


def test_stats_count_tokens_once_even_when_preempted() -> None:
    engine = make_engine(num_blocks=16)
    for name in "abc":
        engine.add(request(name, (5,) * 12, max_tokens=30, ignore_eos=True))
    drain(engine)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.prompt_tokens, stats.generation_tokens) == (36, 90)
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)


def test_stats_show_who_runs_and_who_waits() -> None:
    engine = make_engine()
    for i in range(6):
        engine.add(request(str(i)))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (4, 2)
    assert stats.kv_usage == 4 / 64


def test_preempted_requests_get_the_same_tokens(
    answers: Callable[[Engine, list[AddRequest]], dict[str, list[int]]],
) -> None:
    random = Random(3)
    requests = [
        request(str(i), (random.randrange(VOCAB_SIZE),) * 11, max_tokens=40, ignore_eos=True)
        for i in range(12)
    ]
    ample, scarce = make_engine(), make_engine(num_blocks=17)
    assert answers(ample, requests) == answers(scarce, requests)
    assert scarce.stats().num_preemptions > 0


@pytest.fixture
def answers() -> Callable[[Engine, list[AddRequest]], dict[str, list[int]]]:
    """The tokens of every request, all of them added at once."""

    def run(engine: Engine, requests: list[AddRequest]) -> dict[str, list[int]]:
        for one in requests:
            engine.add(one)
        outputs = drain(engine)
        return {one.request_id: tokens_of(outputs, one.request_id) for one in requests}

    return run


def test_random_arrivals_and_aborts_leave_nothing_behind() -> None:
    random = Random(1)
    engine = make_engine(num_blocks=20)
    alive: set[str] = set()
    ended = 0
    for i in range(1500):
        if random.random() < 0.4:
            prompt = tuple(random.randrange(VOCAB_SIZE) for _ in range(random.randint(1, 30)))
            engine.add(request(str(i), prompt, max_tokens=random.randint(1, 20), seed=i))
            alive.add(str(i))
        if alive and random.random() < 0.05:
            engine.abort(alive.pop())
        for output in engine.step():
            assert output.request_id in alive
            if isinstance(output, NewTokens) and output.finish_reason:
                alive.remove(output.request_id)
                ended += 1
    for output in drain(engine):
        assert output.request_id in alive
    assert ended > 100
    assert engine.stats().kv_usage == 0.0
