"""Engines: one protocol, and a file for each way of running one."""
