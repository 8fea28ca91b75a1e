"""Thousands of random requests against the scheduler, its invariants checked every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from qserve.serve.block_manager import BlockManager
from qserve.serve.messages import FinishReason, SamplingParams
from qserve.serve.scheduler import Chunk, Limits, Scheduler
from qserve.serve.sequence import Sequence, SequenceStatus


@dataclass
class Load:
    """What arrives: how often, how long, how often a client leaves."""

    num_requests: int = 200
    arrivals_per_step: float = 0.6
    abort_chance: float = 0.0
    max_prompt: int = 60
    max_output: int = 40


@dataclass
class Simulation:
    """A scheduler under load, with a model that answers anything in no time."""

    scheduler: Scheduler
    load: Load
    random: Random
    unfinished: dict[str, Sequence] = field(default_factory=dict)
    finished: list[Sequence] = field(default_factory=list)
    first_chunk_order: list[int] = field(default_factory=list)
    num_arrived: int = 0

    def run(self) -> None:
        """Until every request has come and gone. Fails when that takes suspiciously long."""
        worst_case = self.load.num_requests * (self.load.max_prompt + self.load.max_output) * 20
        for _ in range(worst_case):
            self.arrive()
            self.step()
            self.leave()
            self.check_blocks()
            if self.num_arrived == self.load.num_requests and not self.unfinished:
                return
        pytest.fail(f"{len(self.unfinished)} requests are still there after {worst_case} steps")

    def arrive(self) -> None:
        while (
            self.num_arrived < self.load.num_requests
            and self.random.random() < self.load.arrivals_per_step
        ):
            limit = self.scheduler.limits.max_model_len
            num_prompt = self.random.randint(1, min(self.load.max_prompt, limit - 1))
            params = SamplingParams(max_tokens=self.random.randint(1, self.load.max_output))
            sequence = Sequence(str(self.num_arrived), (1,) * num_prompt, params)
            self.scheduler.add(sequence)
            self.unfinished[sequence.request_id] = sequence
            self.num_arrived += 1

    def step(self) -> None:
        decoding = [s for s in self.scheduler.running if s.num_computed == s.num_tokens - 1]
        num_preemptions = self.scheduler.num_preemptions
        chunks = self.scheduler.schedule()
        self.check_chunks(chunks)
        if self.scheduler.num_preemptions == num_preemptions:
            granted = {id(chunk.sequence) for chunk in chunks}
            assert all(id(sequence) in granted for sequence in decoding), "a token was held up"
        for chunk in chunks:
            self.compute(chunk)

    def compute(self, chunk: Chunk) -> None:
        sequence, samples = chunk.sequence, chunk.samples
        if not sequence.num_computed and not sequence.num_output_tokens:
            self.first_chunk_order.append(int(sequence.request_id))
        sequence.num_computed = chunk.end
        if not samples:
            return
        sequence.token_ids.append(2)
        ended = sequence.num_output_tokens == sequence.params.max_tokens
        if ended or sequence.num_tokens == self.scheduler.limits.max_model_len:
            self.finish(sequence, FinishReason.LENGTH)

    def leave(self) -> None:
        for sequence in list(self.unfinished.values()):
            if self.random.random() < self.load.abort_chance:
                self.finish(sequence, FinishReason.ABORT)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence, reason)
        del self.unfinished[sequence.request_id]
        self.finished.append(sequence)

    def check_chunks(self, chunks: list[Chunk]) -> None:
        limits = self.scheduler.limits
        assert bool(chunks) == bool(self.unfinished), "a step without progress"
        assert sum(chunk.num_tokens for chunk in chunks) <= limits.max_num_batched_tokens
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks) <= limits.max_num_seqs
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.status is SequenceStatus.RUNNING
            assert sequence.num_computed == chunk.start < chunk.end <= sequence.num_tokens
            room = len(sequence.block_table) * self.scheduler.blocks.block_size
            assert chunk.end <= room

    def check_blocks(self) -> None:
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        held = [block for sequence in scheduler.running for block in sequence.block_table]
        assert len(set(held)) == len(held), "a block has two owners"
        assert len(held) + blocks.num_free == blocks.num_blocks, "a block leaked"
        assert sum(blocks.ref_counts) == len(held)
        assert all(blocks.ref_counts[block] == 1 for block in held)
        assert len(scheduler.running) <= scheduler.limits.max_num_seqs
        for sequence in scheduler.running:
            assert sequence.num_computed <= len(sequence.block_table) * blocks.block_size
        for sequence in scheduler.waiting:
            assert sequence.status is SequenceStatus.WAITING
            assert not sequence.block_table
            assert sequence.num_computed == 0
        for sequence in self.finished:
            assert not sequence.block_table
        unfinished = [*scheduler.running, *scheduler.waiting]
        assert {id(s) for s in unfinished} == {id(s) for s in self.unfinished.values()}
        self.finished.clear()


def simulate(
    seed: int, load: Load, limits: Limits, num_blocks: int, block_size: int = 4
) -> Simulation:
    scheduler = Scheduler(limits, BlockManager(num_blocks, block_size))
    simulation = Simulation(scheduler, load, Random(seed))
    simulation.run()
    assert scheduler.blocks.num_free == num_blocks
    assert simulation.first_chunk_order == sorted(simulation.first_chunk_order), "out of turn"
    return simulation


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [8, 16, 64, 4096])
def test_every_request_ends_with_ample_blocks(seed: int, budget: int) -> None:
    simulation = simulate(seed, Load(), Limits(8, budget, 128), num_blocks=8 * 32)
    assert simulation.scheduler.num_preemptions == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_blocks", "block_size"), [(32, 4), (40, 4), (128, 1), (8, 16)])
def test_every_request_ends_when_blocks_are_short(
    seed: int, num_blocks: int, block_size: int
) -> None:
    simulation = simulate(seed, Load(), Limits(8, 16, 128), num_blocks, block_size)
    assert simulation.scheduler.num_preemptions > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("abort_chance", [0.01, 0.3])
def test_clients_may_leave_at_any_moment(seed: int, abort_chance: float) -> None:
    load = Load(num_requests=500, arrivals_per_step=0.8, abort_chance=abort_chance)
    assert simulate(seed, load, Limits(8, 16, 128), num_blocks=32).unfinished == {}


@pytest.mark.parametrize("seed", range(3))
def test_a_flood_drains_in_order(seed: int) -> None:
    load = Load(num_requests=400, arrivals_per_step=0.999, max_prompt=20, max_output=10)
    simulation = simulate(seed, load, Limits(16, 16, 32), num_blocks=40, block_size=2)
    assert len(simulation.first_chunk_order) == load.num_requests


def test_one_sequence_at_a_time_with_a_budget_of_one_token() -> None:
    simulation = simulate(0, Load(num_requests=40), Limits(1, 1, 128), num_blocks=32)
    assert len(simulation.first_chunk_order) == 40
