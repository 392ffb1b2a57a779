"""Who decides what happens next: the brain of a run, without pytest."""
