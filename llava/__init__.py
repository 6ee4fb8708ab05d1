"""LLaVA with adaptive visual-token reduction, on today's stack. How it is built: docs/architecture.md."""

__version__ = "2.0.0.dev0"
