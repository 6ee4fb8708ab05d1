"""LLaVA with adaptive visual-token reduction, on today's stack. docs/architecture.md shows how it is built."""
