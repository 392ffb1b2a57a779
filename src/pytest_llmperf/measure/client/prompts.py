"""What a round sends, from a seed: prompts, lengths, their order, and when.

Lengths, classes, order and arrivals come from the seed alone: every round of every launch asks for the same work. Only the
token ids differ from round to round, so that no prompt meets itself in a prefix cache. Prompts are token ids, where the API
takes them, so that no tokenizer's merges decide how long a prompt is.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.datasets import MOONCAKE_BLOCK, read_dataset, read_lengths, read_trace
from pytest_llmperf.plan.lengths import Lengths
from pytest_llmperf.plan.workload import RequestClass, parse_arrivals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.plan.workload import Workload

WARM_UP = -1
"""The number of the warm-up round, whose prompts no measured round repeats; further ones are below it."""

_COMMON_VOCABULARY = 30_000
_WARM_UP_REQUESTS = 32
"""How many requests warm up an open loop, which has no wave."""

_MARK_WORDS = 4
Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Prompt:
    """One request: what is asked, and how many tokens to generate."""

    token_ids: tuple[int, ...] = ()
    output_tokens: int = 1
    text: str = ""
    """The prompt of a completions API that is no token ids."""
    messages: Messages = ()
    """(role, text) of a chat API."""
    request_class: str = ""
    model: str = ""
    """The LoRA adapter that is asked for; empty for the model itself."""
    body: str = "{}"
    """What else goes into the request's body, as JSON."""
    due_s: float | None = None
    """When it is to be sent, in seconds since the round's beginning; None: as soon as its turn comes."""
    follows: bool = False
    """It continues the conversation of the prompt before it: it is sent when that one is answered."""


def prompts(workload: Workload, number: int, *, vocabulary: int | None, nonce: str) -> list[Prompt]:
    """Return the prompts of round `number`, in the order in which they are sent.

    Those that share nothing by design are unlike each other and those of every other round. `vocabulary` is the model's number
    of token ids; None (a model whose config is not at hand) uses ids that every common model has. The `nonce` keeps apart what
    an engine sees: with a case's id the prompts are the same in every launch of the case and in no other case; an endpoint that
    outlives the run needs a new one each time, or answers from its prefix cache.
    """
    size = vocabulary or _COMMON_VOCABULARY
    ids = range(min(size // 4, 1000), size)  # the first ids are the special tokens in most vocabularies
    words = _Words(ids, f"{workload.seed}/{nonce}/{number}")
    wanted = _wanted(workload)
    picked = _warm_up(workload, wanted) if number <= WARM_UP else range(len(wanted))
    return [_prompt(workload, index, wanted[index], words) for index in picked]


@dataclass(frozen=True)
class _Wanted:
    """One request as the seed decides it: everything but the token ids."""

    prompt_tokens: int
    output_tokens: int
    kind: RequestClass | None = None
    due_s: float | None = None
    blocks: tuple[int, ...] = ()
    messages: Messages = ()
    turn: int = 0
    prefix: int = 0


@functools.lru_cache(maxsize=8)
def _wanted(workload: Workload) -> tuple[_Wanted, ...]:
    rng = random.Random(f"{workload.seed}/lengths")
    if workload.trace:
        rows = read_trace(workload.trace)[: workload.requests]
        return tuple(
            _Wanted(row.prompt_tokens, row.output_tokens, due_s=row.at_s / workload.speed, blocks=row.blocks) for row in rows
        )
    if workload.dataset:
        conversations = list(read_dataset(workload.dataset))
        rng.shuffle(conversations)
        said = itertools.islice(itertools.cycle(conversations), workload.requests)
        lengths = _lengths(workload.output_tokens, workload.requests, rng)
        wanted = [
            _Wanted(0, said_before.output_tokens or length, messages=said_before.messages)
            for said_before, length in zip(said, lengths, strict=True)
        ]
    else:
        wanted = _drawn(workload, rng)
    if not workload.rate:
        return tuple(wanted)
    starts = iter(arrivals(workload, workload.requests // workload.turns))
    return tuple(request if request.turn else replace(request, due_s=next(starts)) for request in wanted)


def _drawn(workload: Workload, rng: random.Random) -> list[_Wanted]:
    """Return the requests of a workload that is made up: each class its share of them, in an order that the seed shuffles."""
    conversations = workload.requests // workload.turns
    kinds: Sequence[RequestClass | None] = workload.classes or (None,)
    counts = _apportioned(conversations, [1.0 if kind is None else kind.share for kind in kinds])
    each: list[list[_Wanted]] = []
    for kind, count in zip(kinds, counts, strict=True):
        source: Any = workload if kind is None else kind
        before = _lengths(source.prompt_tokens, count * workload.turns, rng)
        after = _lengths(source.output_tokens, count * workload.turns, rng)
        pairs = iter(zip(before, after, strict=True))
        each += [[_Wanted(*next(pairs), kind=kind, turn=turn) for turn in range(workload.turns)] for _ in range(count)]
    if len(kinds) > 1:
        rng.shuffle(each)
    return [replace(request, prefix=number % workload.prefixes) for number, turns in enumerate(each) for request in turns]


def _apportioned(total: int, shares: Sequence[float]) -> list[int]:
    """Return whole numbers in these shares that sum to `total`, each at least 1 (largest remainders)."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [max(1, math.floor(share)) for share in exact]
    by_need = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        order = by_need if step > 0 else [index for index in reversed(by_need) if counts[index] > 1]
        for index in order[: abs(total - sum(counts))]:
            counts[index] += step
    return counts


def _lengths(lengths: int | Lengths, count: int, rng: random.Random) -> list[int]:
    if not isinstance(lengths, Lengths):
        return [lengths] * count
    if lengths.file:
        return rng.choices(read_lengths(lengths.file), k=count)
    if lengths.kind == "uniform":
        low, high = map(int, lengths.numbers)
        return [rng.randint(low, high) for _ in range(count)]
    mean, sigma, *most = lengths.numbers
    drawn = (rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma) for _ in range(count))
    return [max(1, round(min([length, *most]))) for length in drawn]


def arrivals(workload: Workload, count: int) -> list[float]:
    """Return the instants at which `count` conversations begin, in seconds since the round's beginning, at the workload's rate.

    Gaps are drawn from the gamma distribution of the wanted burstiness, and stretched so that the rate is met exactly: Poisson
    arrivals given their number. A ramp has the same order of gaps, at a rate that grows from its first to its second number.
    """
    shape = parse_arrivals(workload.arrivals) or 1.0
    rng = random.Random(f"{workload.seed}/arrivals")
    gaps = [1.0 if math.isinf(shape) else rng.gammavariate(shape, 1 / shape) for _ in range(count + 1)]
    total = sum(gaps)
    # Between beginning and end lie count + 1 gaps; constant arrivals begin at once.
    spread = [sum_ / total * count for sum_ in itertools.accumulate(gaps[:-1])]
    if math.isinf(shape):
        spread = [float(index) for index in range(count)]
    # A rate is of requests; what arrives is conversations.
    first, last = workload.rate[0] / workload.turns, workload.rate[-1] / workload.turns
    duration_s = count / ((first + last) / 2)
    slope = (last - first) / duration_s
    # n(t) = first t + slope t^2 / 2, solved for t without cancellation.
    return [2 * place / (first + math.sqrt(first**2 + 2 * slope * place)) for place in spread]


def _warm_up(workload: Workload, wanted: Sequence[_Wanted]) -> list[int]:
    """Return one full wave of the real lengths, by index: of each conversation the first turn, sent as in a measured round."""
    firsts = [index for index, request in enumerate(wanted) if not request.turn]
    count = _WARM_UP_REQUESTS if workload.is_open else workload.concurrency
    return firsts[:count]


class _Words:
    """Token ids and words that are the same whenever they are asked for by the same name."""

    def __init__(self, ids: range, seed: str) -> None:
        self.ids = ids
        self.seed = seed

    def tokens(self, name: str, count: int) -> tuple[int, ...]:
        return tuple(random.Random(f"{self.seed}/{name}").choices(self.ids, k=count))

    def text(self, name: str, count: int) -> str:
        return " ".join(random.Random(f"{self.seed}/{name}").choices(WORDS, k=count))


WORDS = re.findall(
    r"\w+",
    """
    time year people way day man thing woman life child world school state family student group country problem hand part
    place case week company system program question work number night point home water room mother area money story fact
    month lot right study book eye job word business issue side kind head house service friend father power hour game line
    end member law car city name team minute idea body information back parent face level office door health person art
    war history party result change morning reason research girl guy food moment air teacher force education
    """,
)
"""Words that common tokenizers have as one token: a chat API takes no token ids, and `usage` tells what they came to."""


def _prompt(workload: Workload, index: int, wanted: _Wanted, words: _Words) -> Prompt:
    kind = wanted.kind
    lora = (kind.lora if kind else "") or (workload.lora[index % len(workload.lora)] if workload.lora else "")
    body = json.loads(workload.extra_body) | (json.loads(kind.extra_body) if kind else {})
    prompt = Prompt(
        output_tokens=wanted.output_tokens,
        request_class=kind.name if kind else "",
        model=lora,
        body=json.dumps(body, sort_keys=True),
        due_s=wanted.due_s,
        follows=wanted.turn > 0,
    )
    if wanted.messages:
        # In front of what is asked, so that no round finds another one's prompts in a prefix cache.
        mark = words.text(f"mark {index}", _MARK_WORDS)
        (role, text), *rest = wanted.messages
        if workload.api == "chat":
            return replace(prompt, messages=((role, f"{mark}: {text}"), *rest))
        return replace(prompt, text=f"{mark}: {wanted.messages[-1][1]}")
    if workload.api == "chat":
        return replace(prompt, messages=_chat(workload, index, wanted, words))
    return replace(prompt, token_ids=_token_ids(workload, index, wanted, words))


def _token_ids(workload: Workload, index: int, wanted: _Wanted, words: _Words) -> tuple[int, ...]:
    if wanted.blocks:
        shared = (words.tokens(f"block {block}", MOONCAKE_BLOCK) for block in wanted.blocks)
        of_blocks = tuple(itertools.chain.from_iterable(shared))[: wanted.prompt_tokens]
        return of_blocks + words.tokens(f"{index}", wanted.prompt_tokens - len(of_blocks))
    prefix = words.tokens(f"prefix {wanted.prefix}", workload.prefix_tokens)
    said = _history(workload, index, wanted)
    before = itertools.chain.from_iterable(
        words.tokens(f"{at}", request.prompt_tokens) + words.tokens(f"answer {at}", request.output_tokens) for at, request in said
    )
    return (*prefix, *before, *words.tokens(f"{index}", wanted.prompt_tokens))


def _chat(workload: Workload, index: int, wanted: _Wanted, words: _Words) -> Messages:
    system = words.text(f"prefix {wanted.prefix}", workload.prefix_tokens)
    said = [("system", system)] if system else []
    for at, request in _history(workload, index, wanted):
        said += [("user", words.text(f"{at}", request.prompt_tokens))]
        said += [("assistant", words.text(f"answer {at}", request.output_tokens))]
    return (*said, ("user", words.text(f"{index}", wanted.prompt_tokens)))


def _history(workload: Workload, index: int, wanted: _Wanted) -> list[tuple[int, _Wanted]]:
    """Return the turns before this one. What the engine answered stands in as tokens of our own, so that the work is the same
    in every launch; an engine that keeps its own answers in its cache finds the questions there, not the answers."""
    before = _wanted(workload)[index - wanted.turn : index]
    return list(zip(range(index - wanted.turn, index), before, strict=True))
