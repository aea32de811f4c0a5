"""Tasks: batches of few-shot problems and where they come from."""

from mtml.tasks.episodes import EpisodeDataset, collate, split_support_query
from mtml.tasks.errors import DataError
from mtml.tasks.generated import Languages, Regions
from mtml.tasks.image_episodes import ImageEpisodes
from mtml.tasks.omniglot import Omniglot
from mtml.tasks.prefetch import Prefetch
from mtml.tasks.sinusoids import Sinusoids
from mtml.tasks.stream import TaskStream
from mtml.tasks.task_batch import TaskBatch

__all__ = [
    "DataError",
    "EpisodeDataset",
    "ImageEpisodes",
    "Languages",
    "Omniglot",
    "Prefetch",
    "Regions",
    "Sinusoids",
    "TaskBatch",
    "TaskStream",
    "collate",
    "split_support_query",
]
