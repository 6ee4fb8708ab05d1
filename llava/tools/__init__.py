"""Tools on checkpoints: merge, extract, consolidate, convert, and what is in a directory."""
