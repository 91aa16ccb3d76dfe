"""One file, one table of speeds."""
