"""Tools on checkpoints: merge, extract, consolidate, convert, deltas, and what is in a directory."""
