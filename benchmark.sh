#!/usr/bin/env bash
# Many runs in parallel, resumed or skipped as needed: ./benchmark.sh --help
exec "${PYTHON:-python}" "$(dirname -- "$0")/experiments/launch.py" "$@"
