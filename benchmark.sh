#!/usr/bin/env bash
# Many runs in parallel, resumed or skipped as needed: ./benchmark.sh --help
cd "$(dirname "$0")" && exec "${PYTHON:-python}" experiments/launch.py "$@"
