"""What a round sends, from a seed: prompts, in the order in which they are sent.

Lengths, classes, order and arrivals (`wanted`) are the same in every round of every launch. Only the token ids differ from round
to round, so that no prompt meets itself in a prefix cache. Prompts are token ids, where the API takes them, so that no
tokenizer's merges decide how long a prompt is.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_llmperf.measure.client.wanted import Wanted, wanted, warming
from pytest_llmperf.measure.client.wanted import arrivals as arrivals

if TYPE_CHECKING:
    from pytest_llmperf.plan.datasets import Conversation
    from pytest_llmperf.plan.workload import Workload

WARM_UP = -1
"""The number of the warm-up round, whose prompts no measured round repeats; further ones are below it."""

_COMMON_VOCABULARY = 30_000
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
    think_s: float = 0.0
    """Seconds from that answer to sending it."""


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
    requests = warming(workload) if number <= WARM_UP else wanted(workload)
    return [_prompt(workload, index, request, words) for index, request in enumerate(requests)]


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


def _prompt(workload: Workload, index: int, request: Wanted, words: _Words) -> Prompt:
    kind = request.kind
    lora = (kind.lora if kind else "") or (workload.lora[index % len(workload.lora)] if workload.lora else "")
    of_entry = json.loads(request.entry.body) if request.entry else {}
    body = of_entry | json.loads(workload.extra_body) | (json.loads(kind.extra_body) if kind else {})
    prompt = Prompt(
        output_tokens=request.output_tokens,
        request_class=kind.name if kind else "",
        model=lora,
        body=json.dumps(body, sort_keys=True),
        due_s=request.due_s,
        follows=request.turn > 0,
        think_s=request.think_s,
    )
    if request.entry:
        return _of_entry(prompt, request.entry, workload.api, index, words)
    if workload.api == "chat":
        return replace(prompt, messages=_chat(workload, index, request, words))
    return replace(prompt, token_ids=_token_ids(workload, index, request, words))


def _of_entry(prompt: Prompt, entry: Conversation, api: str, index: int, words: _Words) -> Prompt:
    """Return the prompt of a dataset's entry, with drawn words in front: no round finds another one's in a prefix cache."""
    if entry.token_ids:
        return replace(prompt, token_ids=words.tokens(f"mark {index}", _MARK_WORDS) + entry.token_ids)
    mark = words.text(f"mark {index}", _MARK_WORDS)
    if api == "chat":
        (role, text), *rest = entry.messages
        return replace(prompt, messages=((role, f"{mark}: {text}"), *rest))
    return replace(prompt, text=f"{mark}: {entry.prompt or entry.messages[-1][1]}")


def _token_ids(workload: Workload, index: int, request: Wanted, words: _Words) -> tuple[int, ...]:
    if request.blocks:
        shared = (words.tokens(f"block {block}", request.block_tokens) for block in request.blocks)
        of_blocks = tuple(itertools.chain.from_iterable(shared))[: request.prompt_tokens]
        return of_blocks + words.tokens(f"{index}", request.prompt_tokens - len(of_blocks))
    prefix = words.tokens(f"prefix {request.prefix}", workload.prefix_tokens)
    said = _history(workload, index, request)
    before = itertools.chain.from_iterable(
        words.tokens(f"{at}", turn.prompt_tokens) + words.tokens(f"answer {at}", turn.output_tokens) for at, turn in said
    )
    return (*prefix, *before, *words.tokens(f"{index}", request.prompt_tokens))


def _chat(workload: Workload, index: int, request: Wanted, words: _Words) -> Messages:
    system = words.text(f"prefix {request.prefix}", workload.prefix_tokens)
    said = [("system", system)] if system else []
    for at, turn in _history(workload, index, request):
        said += [("user", words.text(f"{at}", turn.prompt_tokens))]
        said += [("assistant", words.text(f"answer {at}", turn.output_tokens))]
    return (*said, ("user", words.text(f"{index}", request.prompt_tokens)))


def _history(workload: Workload, index: int, request: Wanted) -> list[tuple[int, Wanted]]:
    """Return the turns before this one. What the engine answered stands in as tokens of our own, so that the work is the same
    in every launch; an engine that keeps its own answers in its cache finds the questions there, not the answers."""
    if not request.turn:
        return []
    before = wanted(workload)[index - request.turn : index]
    return list(zip(range(index - request.turn, index), before, strict=True))
