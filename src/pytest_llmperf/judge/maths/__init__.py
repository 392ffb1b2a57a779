"""The mathematics of the verdict: it imports numpy and scipy, and nothing of this package but itself."""
