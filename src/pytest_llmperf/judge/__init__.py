"""Is it worse? Statistics, stored baselines, the verdict, and what may be the cause."""
