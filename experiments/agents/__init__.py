"""A trained agent: watch it, film it, keep it small."""
