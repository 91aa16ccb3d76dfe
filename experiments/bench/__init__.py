"""Many runs: suites, the launcher behind benchmark.sh, its back end on a cluster, exports."""
