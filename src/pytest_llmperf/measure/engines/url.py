"""An endpoint that somebody else runs: it is checked, measured and left as it was."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.engines import api, discovery
from pytest_llmperf.measure.engines.engine import Completion, EngineError, StartSettings
from pytest_llmperf.measure.engines.phases import Phases
from pytest_llmperf.plan.engine import check_url

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Self

    from pytest_llmperf.measure.client.messages import RoundLog
    from pytest_llmperf.measure.client.processes import LoadClient
    from pytest_llmperf.measure.client.prompts import Prompt
    from pytest_llmperf.plan.engine import EngineSpec


class UrlEngine:
    """An engine behind a URL; what its `/metrics` doesn't report stays unknown."""

    gpus: tuple[int, ...] = ()
    watch = None
    startup_s: float | None = None
    phases = Phases()
    log_path: Path | None = None

    def __init__(self, spec: EngineSpec, host: object, settings: StartSettings, *_: object) -> None:
        """Note the endpoint; nothing is sent before the block is entered, and this host has no part in it."""
        self.spec = spec
        self._wanted = settings.served_model
        self.versions: dict[str, str] = {}
        self.api = "completions"
        """The API that has given a token."""
        url = check_url(spec.url, origin="url")
        self.endpoint = Endpoint(url, self._wanted or "", settings.api_key, settings.headers)
        self.url = self.endpoint.shown

    @property
    def api_key(self) -> str | None:
        """Return what requests must bring, None for nothing."""
        return self.endpoint.api_key

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that every request must have."""
        return self.endpoint.head()

    def __enter__(self) -> Self:
        """Find out model, software and what requests it takes, or raise EngineError."""
        models = discovery.listing(self.endpoint)
        self.endpoint = replace(self.endpoint, model=discovery.chosen_model(self.endpoint, models, self._wanted))
        self.versions = discovery.software(self.endpoint, models, self.metrics_text())
        self.endpoint, self.api = discovery.probed(self.endpoint, gives_ids=discovery.may_give_ids(self.versions))
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the endpoint as it is."""

    def check(self) -> None:
        """Raise EngineError if the endpoint gives no token."""
        self.generate([1, 2, 3], max_tokens=1)

    def metrics_text(self) -> str | None:
        """Return the endpoint's `/metrics`, None if it has none."""
        return api.metrics_text(self.endpoint)

    def log_text(self) -> str:
        """Return nothing: the log is somebody else's."""
        return ""

    def failure(self, what: str) -> EngineError:
        """Return an error that says what happened, and where."""
        return EngineError(f"{self.url}: {what}")

    def play(self, prompts: Sequence[Prompt], client: LoadClient, **how: Any) -> RoundLog:
        """Send these prompts over HTTP and return what happened; raises ClientError when a load process fails.

        Raises EngineError where the endpoint has only a chat API, and the prompts are for the other.
        """
        if discovery.lacks_api(self.api, prompts):
            raise self.failure(discovery.ONLY_CHAT)
        return client.play(self.endpoint.plan(prompts, **how))

    def idle(self, idle_s: float) -> None:
        """Let it idle for so long, as far as we are concerned; the next request tells whether it lives: asking would wake it."""
        threading.Event().wait(idle_s)

    def generate(self, prompt: str | list[int], *, max_tokens: int = 16) -> Completion:
        """Return the completion of one prompt, or raise EngineError; token ids become words where it takes none."""
        return api.complete(self.endpoint, discovery.asked_as(self.endpoint, self.api, prompt), max_tokens, api=self.api)
