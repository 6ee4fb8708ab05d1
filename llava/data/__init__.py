"""Conversations and pictures as training batches. `llava.data.table` reads files, `doctor` checks them."""

from llava.data.dataset import BadSample, DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.data.sampling import length_grouped_order
from llava.data.text import encode_conversation

__all__ = [
    "BadSample",
    "DataCollatorForSupervisedDataset",
    "LazySupervisedDataset",
    "encode_conversation",
    "length_grouped_order",
]
