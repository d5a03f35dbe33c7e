"""Training data as index maps: tokens lie in memory-mapped files, a batch is a function of the step."""

from mbfn.data.batches import read_batch
from mbfn.data.dataset import Dataset, Split, open_dataset
from mbfn.data.loader import prefetched

__all__ = ["Dataset", "Split", "open_dataset", "prefetched", "read_batch"]
