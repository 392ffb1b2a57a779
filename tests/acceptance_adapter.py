"""Drive the production functions by the acceptance harness.  Nothing is decided here."""

from __future__ import annotations

import numpy as np

from pytest_llmperf.judge.maths import prior, stats


class Factory:
    def __init__(self, baselines, launches):
        self.design = stats.Design(comparisons=len(baselines), launches=launches)
        self.scatters = [stats.round_scatter(rounds) for rounds in baselines]
        self.levels = [self.level(i, rounds) for i, rounds in enumerate(baselines)]
        variances = [np.var(x, ddof=1) for x in self.levels]
        self.priors = prior.fit_priors(variances, [len(x) - 1 for x in self.levels], self.scatters)

    def level(self, i, rounds):
        return stats.launch_levels(rounds, higher_is_better=False, scatter=self.scatters[i])

    def decide(self, i, rounds):
        verdict = stats.decide(self.levels[i], self.level(i, rounds), design=self.design, prior=self.priors[i])
        return {"regressed": "regression"}.get(verdict.outcome, verdict.outcome)
