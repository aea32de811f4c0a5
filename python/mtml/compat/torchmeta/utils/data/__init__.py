"""Few-shot tasks, sets of them, and loaders that batch them."""

from mtml.compat.torchmeta.utils.data.dataloader import BatchMetaDataLoader, MetaDataLoader
from mtml.compat.torchmeta.utils.data.dataset import ClassDataset, CombinationMetaDataset, MetaDataset
from mtml.compat.torchmeta.utils.data.sampler import CombinationRandomSampler, CombinationSequentialSampler
from mtml.compat.torchmeta.utils.data.task import ConcatTask, Dataset, SubsetTask, Task
from mtml.compat.torchmeta.utils.data.wrappers import NonEpisodicWrapper

__all__ = [
    "BatchMetaDataLoader",
    "ClassDataset",
    "CombinationMetaDataset",
    "CombinationRandomSampler",
    "CombinationSequentialSampler",
    "ConcatTask",
    "Dataset",
    "MetaDataLoader",
    "MetaDataset",
    "NonEpisodicWrapper",
    "SubsetTask",
    "Task",
]
