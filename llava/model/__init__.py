"""The way of the data: vision tower -> reducer -> projector -> splice -> LLaMA, and how it is stored."""
