"""One file, one figure or table of a paper."""
