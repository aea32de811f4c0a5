"""learn2learn's data sets, task sets and transforms, and what is left of the original's traps."""

from __future__ import annotations

import pickle
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.omniglot_files import make_omniglot
from torch.utils.data import DataLoader, Dataset, TensorDataset

from mtml.compat.learn2learn import data
from mtml.compat.learn2learn.data import samplers
from mtml.compat.learn2learn.data import transforms as T
from mtml.compat.learn2learn.vision import benchmarks, datasets
from mtml.compat.learn2learn.vision.transforms import RandomClassRotation
from mtml.tasks import DataError


class Listed(Dataset[Any]):
    """Samples one by one, which no transform may take together."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


def tensors(classes: int = 6, each: int = 5) -> TensorDataset:
    """Sample i is [i, its label]."""
    y = torch.arange(classes * each) % classes
    return TensorDataset(torch.stack([torch.arange(classes * each), y], 1), y)


def few_shot(dataset: data.MetaDataset, n: int = 3, k: int = 2, **options: Any) -> list[Any]:
    return [T.FusedNWaysKShots(dataset, n=n, k=k, **options), T.LoadData(dataset), T.RemapLabels(dataset)]


# --- data sets ---


def test_the_maps_of_a_data_set() -> None:
    plain = tensors()
    for dataset in (plain, Listed(*plain.tensors), Listed(plain.tensors[0], plain.tensors[1].tolist())):
        meta = data.MetaDataset(dataset)
        assert (
            len(meta) == 30 and meta.labels == [0, 1, 2, 3, 4, 5] and meta.labels_to_indices[4] == [4, 10, 16, 22, 28]
        )
        assert meta.indices_to_labels[10] == 4 and int(meta[10][1]) == 4
    names = data.MetaDataset(Listed(range(4), np.array(["b", "a", "b", "a"])))
    assert names.labels == ["b", "a"] and names.labels_to_indices == {"b": [0, 2], "a": [1, 3]}


def test_maps_that_are_given() -> None:
    by_label = data.MetaDataset(tensors(2, 2), labels_to_indices={"even": [0, 2], "odd": [1, 3]})
    assert by_label.indices_to_labels == {0: "even", 2: "even", 1: "odd", 3: "odd"}
    by_index = data.MetaDataset(tensors(2, 2), indices_to_labels={0: "a", 1: "b", 2: "b", 3: "a"})
    assert by_index.labels_to_indices == {"a": [0, 3], "b": [1, 2]} and by_index.labels == ["a", "b"]


def test_errors_of_data_sets() -> None:
    with pytest.raises(TypeError, match=r"dataset: expected a torch\.utils\.data\.Dataset, got \[1, 2\]"):
        data.MetaDataset([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dataset: expected labels of one number"):
        data.MetaDataset(Listed(range(2), torch.zeros(2, 3)))
    with pytest.raises(ValueError, match=r"labels: expected labels of the data set, got 9"):  # was an empty class
        data.FilteredMetaDataset(tensors(), [0, 9])


def test_maps_are_kept_in_a_file_and_made_again_for_other_data(tmp_path: Path) -> None:
    """The original believed a file of other data."""
    path, reads = tmp_path / "maps.pkl", []

    class Counted(Listed):
        _bookkeeping_path = str(path)

        def __getitem__(self, i: int) -> Any:
            reads.append(i)
            return super().__getitem__(i)

    first = data.MetaDataset(Counted(range(4), [0, 1, 1, 0]))
    assert path.exists() and len(reads) == 4
    assert data.MetaDataset(Counted(range(4), [0, 1, 1, 0])).labels_to_indices == first.labels_to_indices
    assert len(reads) == 4
    assert data.MetaDataset(Counted(range(3), [5, 5, 6])).labels == [5, 6]
    path.write_bytes(pickle.dumps({"labels_to_indices": print}))  # nothing in it is run
    assert data.MetaDataset(Counted(range(2), [8, 9])).labels == [8, 9]
    path.write_bytes(b"no pickle")
    assert data.MetaDataset(Counted(range(2), [8, 9])).labels == [8, 9]


def test_unions_and_filters() -> None:
    left, right = tensors(2, 2), Listed([[9, 9], [8, 8]], ["x", "y"])
    union = data.UnionMetaDataset([left, right])
    assert len(union) == 6 and union.labels == [0, 1, 2, 3]
    assert union[1][1] == 1 and union[4] == [[9, 9], 2] and union[5] == [[8, 8], 3]
    for index in (6, -1):  # was None
        with pytest.raises(IndexError, match=r"index: expected 0\.\.5"):
            union[index]
    some = data.FilteredMetaDataset(union, [3, 0])
    assert len(some) == 3 and some.labels == [3, 0] and some[0] == [[8, 8], 3]
    assert some.labels_to_indices == {3: [0], 0: [1, 2]}
    both = data.UnionMetaDataset((some, data.FilteredMetaDataset(union, [1, 2])))
    assert len(both) == 6 and sorted(both.labels) == [0, 1, 2, 3]


def test_a_data_set_on_a_device() -> None:
    source = Listed(torch.arange(6.0).view(3, 2), [2, 0, 2])
    there = data.OnDeviceDataset(source, device="cpu", transform=lambda x: x + 1)
    assert there.tensors[1].tolist() == [2, 0, 2] and there[1][0].tolist() == [3, 4]
    assert data.MetaDataset(there).labels_to_indices == {2: [0, 2], 0: [1]}


# --- parts of a task, endless loaders ---


def test_partition() -> None:
    y = torch.tensor([2, 0, 2, 0, 2, 0])
    (sx, sy), (qx, qy) = data.partition_task(torch.arange(6).view(6, 1), y, shots=2)
    assert sx.flatten().tolist() == [1, 3, 0, 2] and sy.tolist() == [0, 0, 2, 2]
    assert qx.flatten().tolist() == [5, 4] and qy.tolist() == [0, 2]
    (sx, _), (qx, _) = data.partition_task(torch.arange(6), y, shots=0)
    assert len(sx) == 0 and len(qx) == 6
    for arguments, message in (
        ((torch.arange(5), y, 1), r"labels: expected one for each of the 5 samples"),
        ((torch.arange(6), torch.tensor([0, 0, 0, 0, 1, 1]), 1), r"equally many samples of every class, got \[4, 2\]"),
        ((torch.arange(6), y, 4), r"shots: expected at most the 3 samples of a class, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            data.partition_task(*arguments)


def test_endless() -> None:
    numbers = data.InfiniteIterator(DataLoader(range(3), batch_size=2))  # type: ignore[arg-type]
    assert [next(numbers).tolist() for _ in range(5)] == [[0, 1], [2], [0, 1], [2], [0, 1]]
    with pytest.raises(ValueError, match=r"dataloader: expected at least one batch"):  # was an endless loop
        next(data.InfiniteIterator([]))


# --- tasks ---


@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
def test_tasks_are_what_they_should_be(together: bool) -> None:
    plain = tensors()
    meta = data.MetaDataset(plain if together else Listed(*plain.tensors))
    tasks = data.Taskset(meta, [*few_shot(meta, 3, 4), T.ConsecutiveLabels(meta)], num_tasks=20)
    for x, y in tasks:
        assert x.shape == (12, 2) and len({tuple(row) for row in x.tolist()}) == 12
        assert sorted(Counter(y.tolist()).items()) == [(0, 4), (1, 4), (2, 4)]
        assert len(set(zip(x[:, 1].tolist(), y.tolist(), strict=True))) == 3  # one id for each label
        assert x[:, 1].tolist() == sorted(x[:, 1].tolist())


def test_taken_together_or_one_by_one_tasks_are_the_same() -> None:
    plain, found = tensors(), []
    for dataset in (plain, Listed(*plain.tensors)):
        random.seed(3)
        meta = data.FilteredMetaDataset(dataset, [1, 3, 4, 5])
        tasks = data.Taskset(meta, few_shot(meta), num_tasks=10)
        found.append([tasks[i] for i in range(10)])
    for one, other in zip(*found, strict=True):
        assert type(one) is type(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_seed_draws_what_the_original_draws() -> None:
    meta = data.MetaDataset(tensors())
    random.seed(7)
    drawn = [d.index for d in T.FusedNWaysKShots(meta, n=3, k=2)(None)]
    random.seed(7)
    labels = random.sample([0, 1, 2, 3, 4, 5], k=3)
    assert drawn == [i for label in labels for i in random.sample(meta.labels_to_indices[label], k=2)]
    random.seed(7)
    remapped = T.RemapLabels(meta)([data.DataDescription(i) for i in (3, 9, 5, 4)])
    random.seed(7)
    labels = [3, 4, 5]
    random.shuffle(labels)
    assert remapped[0].transforms[0]((0, torch.tensor(4))) == [0, labels.index(4)]


def test_transforms_of_a_given_task() -> None:
    meta = data.MetaDataset(tensors())
    some = [data.DataDescription(i) for i in (0, 6, 1, 7, 13, 2)]  # labels 0 0 1 1 1 2
    assert [d.index for d in T.FilterLabels(meta, [1, 2])(some)] == [1, 7, 13, 2]
    assert {meta.indices_to_labels[d.index] for d in T.NWays(meta, n=2)(some)} < {0, 1, 2}
    assert Counter(meta.indices_to_labels[d.index] for d in T.KShots(meta, k=1)(some)) == {0: 1, 1: 1, 2: 1}
    assert [d.index for d in T.ConsecutiveLabels(meta)([some[5], *some[:5]])] == [0, 6, 1, 7, 13, 2]
    fused = T.FusedNWaysKShots(meta, n=1, k=2, filter_labels=[1])(some)
    assert len(fused) == 2 and {d.index for d in fused} <= {1, 7, 13}
    assert len(T.NWays(meta, n=2)(None)) == 10 and len(T.LoadData(meta)(None)) == 30


@pytest.mark.parametrize("transform", [T.KShots, T.FusedNWaysKShots])
def test_shots_with_replacement_have_transforms_of_their_own(transform: Any) -> None:
    meta = data.MetaDataset(tensors(2, 1))
    drawn = transform(meta, k=4, replacement=True)(None)
    assert len(drawn) == 8 and len({id(d) for d in drawn}) == 8
    x, y = data.Taskset(meta, [lambda _: drawn, *few_shot(meta)[1:]], num_tasks=1)[0]
    assert Counter(y.tolist()) == {0: 4, 1: 4} and len(x) == 8


def test_too_few_classes_or_samples() -> None:
    meta = data.MetaDataset(tensors(3, 2))
    for transform, message in (
        (T.NWays(meta, n=4), r"n: expected at most the 3 labels of the data set, got 4"),
        (T.FusedNWaysKShots(meta, n=2, filter_labels=[1]), r"n: expected at most the 1 labels to choose from, got 2"),
        (T.FusedNWaysKShots(meta, n=2, k=3), r"k: expected at most the 2 samples of label \d, got 3"),
        (T.KShots(meta, k=3), r"k: expected at most the 2 samples of label 0, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            transform(None)


@pytest.mark.parametrize("transform", [T.NWays, T.KShots, T.FusedNWaysKShots, T.RemapLabels, T.ConsecutiveLabels])
def test_transforms_that_read_labels_need_a_meta_dataset(transform: Any) -> None:
    with pytest.raises(TypeError, match=r"dataset: expected a MetaDataset, got TensorDataset; wrap it"):
        transform(tensors())


def test_task_sets_as_sequences() -> None:
    meta = data.MetaDataset(tensors())
    tasks = data.Taskset(meta, few_shot(meta), num_tasks=3)
    first = [x.tolist() for x, _ in tasks]
    assert [x.tolist() for x, _ in tasks] == first == [tasks[i][0].tolist() for i in range(3)]
    # one loop within another: the original's shared a position
    assert sum(1 for _ in tasks for _ in tasks) == 9
    iter(tasks)
    with pytest.raises(StopIteration):
        while True:
            next(tasks)
    with pytest.raises(IndexError, match=r"index: expected 0\.\.2, got 3"):
        tasks[3]
    endless = data.Taskset(meta, few_shot(meta))
    assert len(endless) == 1 and endless[5] and not torch.equal(endless.sample()[0], endless.sample()[0])
    for count in (0, -2):
        with pytest.raises(ValueError, match=r"num_tasks: expected -1 \(endless\) or a positive int"):
            data.Taskset(meta, num_tasks=count)
    with pytest.raises(ValueError, match=r"task_transforms: expected at least one"):
        data.Taskset(meta).sample()
    with pytest.raises(NotImplementedError, match=r"UnionMetaDataset"):
        tasks + tasks
    with pytest.warns(DeprecationWarning, match=r"called Taskset now"):
        assert isinstance(data.TaskDataset(meta), data.Taskset)


def test_transforms_of_ones_own_and_other_collations() -> None:
    meta = data.MetaDataset(tensors())

    def doubled(task: list[Any]) -> list[Any]:
        for description in task:
            description.transforms.append(lambda sample: (2 * sample[0], sample[1]))
        return task

    random.seed(0)
    expected = data.Taskset(meta, few_shot(meta)).sample()
    random.seed(0)
    found = data.Taskset(meta, [*few_shot(meta), doubled]).sample()
    assert torch.equal(found[0], 2 * expected[0]) and torch.equal(found[1], expected[1])
    indices = data.Taskset(meta, T.NWays(meta, n=1)).sample()  # no transform of the samples: their indices
    assert sorted(indices.tolist()) == meta.labels_to_indices[int(indices[0]) % 6]
    assert isinstance(data.Taskset(meta, few_shot(meta), task_collate=list).sample()[0], list)

    class Shifted(data.MetaDataset):
        def __getitem__(self, item: int) -> Any:
            x, y = super().__getitem__(item)
            return x + 100, y

    shifted = Shifted(tensors())
    assert data.Taskset(shifted, few_shot(shifted)).sample()[0].min() >= 100  # what a subclass gives, is taken


def test_tasks_in_processes_and_pickles() -> None:
    meta = data.MetaDataset(tensors())
    tasks = data.Taskset(meta, few_shot(meta), num_tasks=4)
    again = pickle.loads(pickle.dumps(tasks))  # the original's held lambdas
    random.seed(1)
    expected = tasks.sample()
    random.seed(1)
    assert all(torch.equal(a, b) for a, b in zip(again.sample(), expected, strict=True))
    x, y = next(iter(DataLoader(tasks, batch_size=4, num_workers=1)))
    assert x.shape == (4, 6, 2) and y.shape == (4, 6)


@pytest.mark.parametrize("count", [4, -1])
def test_a_sampler_of_tasks(count: int) -> None:
    meta = data.MetaDataset(tensors())
    tasks = data.Taskset(meta, [T.FusedNWaysKShots(meta, n=2, k=3)], num_tasks=count)
    loader = iter(DataLoader(meta, batch_sampler=samplers.TasksetSampler(tasks)))
    for _ in range(4):
        x, y = next(loader)
        assert len(x) == 6 and sorted(Counter(y.tolist()).values()) == [3, 3]
    if count == 4:
        assert next(loader, None) is None and len(tasks.sampled_descriptions) == 4


def test_a_batch_of_tasks_for_the_engine() -> None:
    meta = data.MetaDataset(TensorDataset(torch.randn(60, 3), torch.arange(60) % 6))
    batch = data.Taskset(meta, few_shot(meta, 5, 4)).batch(3, shots=1)
    assert batch.sx.shape == (3, 5, 3) and batch.qx.shape == (3, 15, 3) and batch.support_mask is None
    assert batch.sy.tolist() == [[0, 1, 2, 3, 4]] * 3


# --- images ---


@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
def test_each_class_turns_by_its_own_angle(together: bool) -> None:
    """In the original every class of a task turned by the last class's angle."""
    y = torch.arange(12) % 3
    plain = TensorDataset(torch.arange(12 * 9.0).view(12, 1, 3, 3), y)
    meta = data.MetaDataset(plain if together else Listed(*plain.tensors))
    turn = RandomClassRotation(meta, [0.0, 90.0, 180.0, 270.0])
    tasks = data.Taskset(meta, [T.LoadData(meta), turn], num_tasks=12)
    seen = set()
    for x, labels in tasks:
        quarters = []
        for image, original in zip(x, plain.tensors[0], strict=True):
            (k,) = [k for k in range(4) if torch.equal(torch.rot90(original, k, (-2, -1)), image)]
            quarters.append(k)
        assert labels.tolist() == y.tolist() and quarters == quarters[:3] * 4
        seen.add(tuple(quarters[:3]))
    assert any(len(set(three)) > 1 for three in seen)


def test_other_angles_are_for_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setitem(sys.modules, "torchvision.transforms.functional", None)  # not installed

    meta = data.MetaDataset(Listed([Image.new("L", (4, 4))], [0]))
    (task,) = RandomClassRotation(meta, [30.0])([data.DataDescription(0)])
    assert task.transforms[0](meta[0])[0].size == (4, 4)
    with pytest.raises(ImportError, match=r"degrees: expected multiples of 90 for tensors, got 30\.0"):
        task.transforms[0]((torch.zeros(1, 4, 4), 0))


@pytest.fixture
def omniglot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTML_CACHE", str(tmp_path / "cache"))
    return make_omniglot(tmp_path / "omniglot-py").parent


def test_all_of_omniglot(omniglot: Path) -> None:
    full = datasets.FullOmniglot(omniglot, transform=np.array, target_transform=lambda y: y + 1)
    meta = data.MetaDataset(full)
    assert len(full) == 18 * 6 and meta.labels == list(range(1, 19)) and len(meta.labels_to_indices[18]) == 6
    image, label = full[6 * 13]  # the first of images_evaluation
    assert label == 14 and image.shape == (28, 28) and image.mean() > 180  # white paper
    with pytest.raises(DataError, match=r"nothing is downloaded here.*images_background.zip"):
        datasets.FullOmniglot(omniglot / "nowhere", download=True)


def test_the_benchmarks_sets_share_no_class(omniglot: Path) -> None:
    """The original's train, validation and test tasks all came from all classes."""
    sets = benchmarks.get_tasksets(
        "omniglot", train_ways=5, train_samples=4, test_ways=3, test_samples=2, root=omniglot, num_tasks=20
    )
    labels = [set(tasks.dataset.labels) for tasks in sets]
    assert [len(each) for each in labels] == [12, 1, 5] and len(set.union(*labels)) == 18
    x, y = sets.train.sample()
    assert x.shape == (20, 1, 28, 28) and x.dtype == torch.float32 and Counter(y.tolist()) == dict.fromkeys(range(5), 4)
    assert x.min() >= 0 and 0.5 < x.max() <= 1 and x.mean() < 0.3
    for tasks, own in zip((sets.train, sets.test), (labels[0], labels[2]), strict=True):
        used = {tasks.dataset.indices_to_labels[d.index] for _ in range(20) for d in tasks.sample_task_description()}
        assert used <= own
    assert sets.test.sample()[0].shape == (6, 1, 28, 28)
    assert sets.train.batch(4, shots=1).qx.shape == (4, 15, 1, 28, 28)


def test_benchmarks_that_are_absent_name_the_way_out() -> None:
    for name in ("mini-imagenet", "cifarfs"):
        with pytest.raises(DataError, match=rf"{name}: not here.*MetaDataset.*EpisodeDataset"):
            benchmarks.get_tasksets(name)
    with pytest.raises(DataError, match=r"MiniImagenet: not here"):
        datasets.MiniImagenet(root="data", mode="train")
    with pytest.raises(ValueError, match=r"name: expected one of omniglot, got 'omni'"):
        benchmarks.get_tasksets("omni")
    assert list(benchmarks.list_tasksets()) == ["omniglot"]


def test_labels_may_stand_in_a_column() -> None:
    """A column was sorted along its own single entry: the first sample came for all."""
    x, ids, tasks = torch.arange(12.0), torch.arange(12) % 3, []
    for labels in (ids, ids[:, None]):
        support, query = data.partition_task(x, labels, 1)
        assert support[0].tolist() == [0, 1, 2] and support[1].flatten().tolist() == [0, 1, 2]
        assert sorted(query[0].tolist()) == list(range(3, 12))
        dataset = data.MetaDataset(TensorDataset(x, labels))
        assert dataset.labels == [0, 1, 2]
        way = [T.FusedNWaysKShots(dataset, n=2, k=2), T.LoadData(dataset), T.RemapLabels(dataset)]
        random.seed(0)
        tasks.append(data.Taskset(dataset, way).sample())
    assert all(torch.equal(a, b) for a, b in zip(*tasks, strict=True))
    several = torch.zeros(12, 2, dtype=torch.int64)
    for take in (lambda: data.partition_task(x, several), lambda: data.MetaDataset(TensorDataset(x, several))):
        with pytest.raises(ValueError, match=r"labels: expected one number for each sample, \[N\] or \[N, 1\], got"):
            take()
