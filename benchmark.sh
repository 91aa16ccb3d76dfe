#!/usr/bin/env bash
# Many runs in parallel, resumed or skipped as needed: ./benchmark.sh --help
root=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd -P)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$root/experiments/bench/launch.py" "$@"
