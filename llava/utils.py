"""One name other projects import from here."""


def disable_torch_init() -> None:
    """Does nothing. Evaluation harnesses call it before they load a model, to save the time torch spends on
    random values a checkpoint replaces; our loader builds models without storage and saves it anyway."""
