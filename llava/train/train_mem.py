"""LLaVA's name for training with the memory-saving attention kernel: `python llava/train/train_mem.py FLAGS`.

The hardware's best kernel is the default of every run, so this is `llava.train.train` under its old name.
"""

from llava.train.train import main, train

__all__ = ["main", "train"]

if __name__ == "__main__":
    main()
