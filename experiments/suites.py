"""The name that tasks.py had, for runs that were begun with --env-id experiments.suites:poplin/Hopper-v0."""

from experiments import tasks as tasks
