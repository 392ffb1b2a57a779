"""How it is measured: a launch of an engine, and the figures that come of it."""
