"""A trained agent: watch it, keep it small."""
