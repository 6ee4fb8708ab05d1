"""Where LLaVA keeps its model classes; others import them from here."""
