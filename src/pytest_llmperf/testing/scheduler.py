"""Which requests are in each step of the simulated engine; how long a step takes is the `Clock`'s.

The rules are those of vLLM's V1 scheduler: running requests first, then first-come first-served admission, chunked
prefill under a token budget, preemption of the most recently admitted request by recomputation. No I/O, no real time:
the HTTP server plays the steps in real time, unit tests add up their durations.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_llmperf.testing.clock import Clock


@dataclass(frozen=True)
class Request:
    """What the scheduler knows of a request; its tokens may be ids or words, only their equality matters."""

    request_id: int
    prompt: tuple[int | str, ...]
    output_tokens: int


@dataclass(frozen=True)
class Step:
    """What one step did: the requests in `emitted` have one token each at its end, `duration_s` after its start."""

    duration_s: float
    emitted: tuple[int, ...] = ()
    finished: tuple[int, ...] = ()
    """Those of `emitted` whose token was their last."""
    preempted: tuple[int, ...] = ()


@dataclass
class Counters:
    """Cumulative counts since the engine's start, of vLLM's metrics of the same names."""

    preemptions: int = 0
    prompt_tokens: int = 0
    """Counted when a request's first token is emitted."""
    generation_tokens: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache; 0 while the cache is off."""
    prefix_hits: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    rounds: int = 0
    peak_blocks: int = 0
    """Most KV blocks in use at once."""


@dataclass(eq=False)
class _Sequence:
    request: Request
    hashes: tuple[int, ...] = ()
    computed: int = 0
    generated: int = 0
    blocks: int = 0
    looked_up: bool = False

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.generated


@dataclass
class _Plan:
    """The step being put together: how many tokens of each sequence it computes, and who had to leave."""

    budget: int
    tokens: dict[_Sequence, int] = field(default_factory=dict)
    preempted: list[_Sequence] = field(default_factory=list)


class Scheduler:
    """The requests of one engine: `add` them, then `step` until `idle`. The same calls give the same steps."""

    def __init__(self, clock: Clock) -> None:
        """Start with an empty engine and draw the noise of its launch."""
        self.clock = clock
        self.counters = Counters()
        self.free_blocks = clock.num_gpu_blocks - 1
        self._launch_noise = clock.noise()
        self._round_noise = 1.0
        self._idle_factor = 1.0
        self._round_due = True
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._seen: OrderedDict[int, None] = OrderedDict()

    @property
    def running(self) -> int:
        """Return the number of admitted requests."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Return the number of requests not yet admitted, preempted ones included."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Return True when no request is left."""
        return not self._running and not self._waiting

    @property
    def kv_usage(self) -> float:
        """Return the used fraction of the KV blocks, from 0 to 1."""
        return 1.0 - self.free_blocks / (self.clock.num_gpu_blocks - 1)

    def check(self, request: Request) -> None:
        """Raise ValueError when a request has no prompt, asks for no token, or could never fit into the KV cache.

        The last would preempt itself for ever.
        """
        if not request.prompt or request.output_tokens < 1:
            raise ValueError(f"request {request.request_id} needs a prompt and at least one output token.")
        # The last token is never stored: it is emitted and the request is over.
        if self._blocks(len(request.prompt) + request.output_tokens - 1) > self.clock.num_gpu_blocks - 1:
            raise ValueError(f"request {request.request_id} does not fit into the KV cache.")

    def add(self, request: Request, *, same_round: bool = False) -> None:
        """Queue a request; on an idle engine this begins a round, unless `same_round` says that the pause was none.

        Raises ValueError as `check` does.
        """
        self.check(request)
        if self.idle and (self._round_due or not same_round):
            self._begin_round()
        hashes = _block_hashes(request.prompt, self.clock.block_size) if self.clock.prefix_cache else ()
        self._waiting.append(_Sequence(request, hashes))

    def abort(self, request_id: int) -> bool:
        """Drop a request and free its blocks; return False when it is not here (any more)."""
        for queue in (self._running, self._waiting):
            for sequence in queue:
                if sequence.request.request_id == request_id:
                    queue.remove(sequence)
                    self._free(sequence)
                    self.counters.requests_aborted += 1
                    return True
        return False

    def reset_prefix_cache(self) -> None:
        """Forget the prompts seen, and let the next request on the idle engine begin a new round."""
        self._seen.clear()
        self._round_due = True

    def idled(self, seconds: float) -> None:
        """Note that there was nothing to do for so long."""
        if seconds >= self.clock.idle_s:
            self._idle_factor = self.clock.idle_slow_down

    def step(self) -> Step:
        """Return the next step, of 0 seconds when there is nothing to do. Counters are as at its end."""
        plan = _Plan(self.clock.max_num_batched_tokens)
        self._schedule_running(plan)
        if not plan.preempted:  # as vLLM: a preempted request does not come back in the same step
            self._admit(plan)
        if not plan.tokens:
            return Step(0.0, preempted=tuple(sequence.request.request_id for sequence in plan.preempted))
        self.counters.peak_blocks = max(self.counters.peak_blocks, self.clock.num_gpu_blocks - 1 - self.free_blocks)
        prefilled = sum(n for sequence, n in plan.tokens.items() if n > 1 or not sequence.generated)
        duration_s = (
            self.clock.step_duration_s(len(plan.tokens), prefilled) * self._launch_noise * self._round_noise * self._idle_factor
        )
        emitted, finished = self._compute(plan)
        return Step(duration_s, emitted, finished, tuple(sequence.request.request_id for sequence in plan.preempted))

    def _begin_round(self) -> None:
        self._round_noise = self.clock.noise(self.counters.rounds)
        self._round_due = False
        self.counters.rounds += 1
        self.counters.preemptions += self.clock.preemptions_per_round

    def _schedule_running(self, plan: _Plan) -> None:
        position = 0
        while position < len(self._running) and plan.budget > 0:
            sequence = self._running[position]
            tokens = min(sequence.length - sequence.computed, plan.budget)
            while not self._allocate(sequence, sequence.computed + tokens):
                victim = self._running.pop()
                self._free(victim)
                victim.computed = 0
                self._waiting.appendleft(victim)
                self.counters.preemptions += 1
                plan.preempted.append(victim)
                if victim is sequence:
                    return
            plan.tokens[sequence] = tokens
            plan.budget -= tokens
            position += 1

    def _admit(self, plan: _Plan) -> None:
        while self._waiting and plan.budget > 0 and len(self._running) < self.clock.max_num_seqs:
            sequence = self._waiting[0]
            cached = self._cached_tokens(sequence)
            tokens = min(sequence.length - cached, plan.budget)
            if not self._allocate(sequence, cached + tokens):
                return
            if self.clock.prefix_cache and not sequence.looked_up:
                sequence.looked_up = True
                self.counters.prefix_queries += len(sequence.request.prompt)
                self.counters.prefix_hits += cached
            sequence.computed = cached
            plan.tokens[sequence] = tokens
            plan.budget -= tokens
            self._running.append(self._waiting.popleft())

    def _compute(self, plan: _Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
        emitted, finished = [], []
        for sequence, tokens in plan.tokens.items():
            sequence.computed += tokens
            self._remember(sequence)
            if sequence.computed < sequence.length:
                continue  # a chunk of a long prefill
            if not sequence.generated:
                self.counters.prompt_tokens += len(sequence.request.prompt)
            sequence.generated += 1
            emitted.append(sequence.request.request_id)
            if sequence.generated == sequence.request.output_tokens:
                finished.append(sequence.request.request_id)
                self._running.remove(sequence)
                self._free(sequence)
        self.counters.generation_tokens += len(emitted)
        self.counters.requests_finished += len(finished)
        return tuple(emitted), tuple(finished)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.clock.block_size)

    def _allocate(self, sequence: _Sequence, tokens: int) -> bool:
        missing = self._blocks(tokens) - sequence.blocks
        if missing > self.free_blocks:
            return False
        if missing > 0:
            self.free_blocks -= missing
            sequence.blocks += missing
        return True

    def _free(self, sequence: _Sequence) -> None:
        self.free_blocks += sequence.blocks
        sequence.blocks = 0

    def _cached_tokens(self, sequence: _Sequence) -> int:
        # vLLM computes the last prompt token always: there must be something to sample from.
        usable = (len(sequence.request.prompt) - 1) // self.clock.block_size
        hits = 0
        while hits < min(usable, len(sequence.hashes)) and sequence.hashes[hits] in self._seen:
            hits += 1
        return hits * self.clock.block_size

    def _remember(self, sequence: _Sequence) -> None:
        if not sequence.hashes or sequence.generated:
            return
        for block in sequence.hashes[: sequence.computed // self.clock.block_size]:
            self._seen[block] = None
            self._seen.move_to_end(block)
        while len(self._seen) > self.clock.num_gpu_blocks:
            self._seen.popitem(last=False)


def token_times_s(clock: Clock, requests: Sequence[Request], concurrency: int) -> dict[int, tuple[float, ...]]:
    """Return each request's send time and token times, in virtual seconds since the round's start, by its id.

    The client is a closed loop: `concurrency` requests are under way, and the next is sent when one has finished.
    """
    scheduler = Scheduler(clock)
    unsent: Iterable[Request] = iter(requests)
    times: dict[int, list[float]] = {}
    now_s = 0.0
    free_slots = concurrency
    while True:
        for _, request in zip(range(free_slots), unsent, strict=False):
            scheduler.add(request, same_round=bool(times))
            times[request.request_id] = [now_s]
        if scheduler.idle:
            return {request_id: tuple(instants) for request_id, instants in times.items()}
        step = scheduler.step()
        now_s += step.duration_s
        for request_id in step.emitted:
            times[request_id].append(now_s)
        free_slots = len(step.finished)


def _block_hashes(prompt: tuple[int | str, ...], block_size: int) -> tuple[int, ...]:
    hashes: list[int] = []
    for start in range(0, len(prompt) - block_size + 1, block_size):
        hashes.append(hash((hashes[-1] if hashes else 0, prompt[start : start + block_size])))
    return tuple(hashes)
