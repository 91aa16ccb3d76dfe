"""Runs and results: reading, statistics, tables, curves, verdicts, the explorer."""
