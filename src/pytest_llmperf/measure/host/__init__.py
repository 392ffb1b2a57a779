"""The host: what machine this is, which model files it has, and whether it can run a case."""
