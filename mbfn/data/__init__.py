"""Training data as index maps: text is tokenised once into a memory-mapped file, a batch is a function of the step."""

from mbfn.data.batches import micro_batches, train_rows, valid_rows
from mbfn.data.dataset import Dataset, open_dataset

__all__ = ["Dataset", "micro_batches", "open_dataset", "train_rows", "valid_rows"]
