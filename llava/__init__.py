"""LLaVA with adaptive visual-token reduction, on today's stack. How it is built: docs/architecture.md."""
