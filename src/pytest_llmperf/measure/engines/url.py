"""An endpoint that somebody else runs: it is checked, measured and left as it was."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.engines import api
from pytest_llmperf.measure.engines.engine import Completion, EngineError, StartSettings
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
    log_path: Path | None = None

    def __init__(self, spec: EngineSpec, host: object, settings: StartSettings, *_: object) -> None:
        """Note the endpoint; nothing is sent before the block is entered, and this host has no part in it."""
        self.spec = spec
        self.url = check_url(spec.url, origin="url")
        self._settings = settings
        self.versions: dict[str, str] = {}
        self.endpoint = Endpoint(self.url, settings.served_model or "", settings.api_key)

    def __enter__(self) -> Self:
        """Ask for the model's name and one token, or raise EngineError."""
        models = api.served_models(self.url, api_key=self._settings.api_key)
        wanted = self._settings.served_model
        if not models or (wanted and wanted not in models):
            raise EngineError(f"{self.url} serves {models or 'no model'}, not {wanted!r}; see --llmperf-model.")
        self.endpoint = Endpoint(self.url, wanted or models[0], self._settings.api_key)
        self.versions = self._version()
        self.check()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the endpoint as it is."""

    def _version(self) -> dict[str, str]:
        try:
            status, body = api.get(f"{self.url}/version", api_key=self._settings.api_key)
            return {"vllm": str(json.loads(body)["version"])} if status == 200 else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # not every endpoint is vLLM; an unknown version is recorded as unknown

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
        """Send these prompts over HTTP and return what happened; raises ClientError when a load process fails."""
        return client.play(self.endpoint.plan(prompts, **how))

    def idle(self, idle_s: float) -> None:
        """Let it idle for so long, as far as we are concerned; the next request tells whether it lives: asking would wake it."""
        threading.Event().wait(idle_s)

    def generate(self, prompt: str | list[int], *, max_tokens: int = 16) -> Completion:
        """Return the completion of one prompt, or raise EngineError."""
        return api.complete(self.endpoint, prompt, max_tokens)
