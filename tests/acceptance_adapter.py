"""Drive the production functions by the acceptance harness.  Nothing is decided here."""
from __future__ import annotations

import numpy as np
import stats


class Factory:
    def __init__(self, baselines, launches):
        self.design = stats.Design(comparisons=len(baselines), launches=launches)
        self.levels = [stats.launch_medians(rounds, higher_is_better=False) for rounds in baselines]
        variances = [np.var(x, ddof=1) for x in self.levels]
        self.prior = stats.fit_prior(variances, [len(x) - 1 for x in self.levels])

    def decide(self, i, rounds):
        candidate = stats.launch_medians(rounds, higher_is_better=False)
        verdict = stats.decide(self.levels[i], candidate, design=self.design, prior=self.prior)
        return {"regressed": "regression"}.get(verdict.outcome, verdict.outcome)
