"""torchmeta's tasks: the same numbers as the original's where it has them, and what is left of its traps."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.omniglot_files import make_omniglot
from torch import Tensor
from torch.nn import functional as F

from mtml.compat import torchmeta
from mtml.compat.torchmeta import datasets, toy, transforms
from mtml.compat.torchmeta.compose import Compose
from mtml.compat.torchmeta.utils import data
from mtml.tasks import DataError


class Points(data.Dataset):
    """The samples of one class: its number and the sample's."""

    def __init__(self, index: int, count: int, **kwargs: Any) -> None:
        super().__init__(index, **kwargs)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        x = torch.tensor([self.index, i])
        return x if self.transform is None else self.transform(x), self.target_transform(f"class {self.index}")


class Classes(data.ClassDataset):
    """Class i has `counts[i]` samples."""

    def __init__(self, counts: tuple[int, ...] = (6,) * 5, cached: bool = False, **kwargs: Any) -> None:
        super().__init__(meta_train=True, **kwargs)
        self.counts = counts
        self.kept = {i: self._points(i) for i in range(len(self))} if cached else {}

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    def _points(self, i: int) -> Points:
        transform = self.get_transform(i)
        return Points(
            i, self.counts[i % self.num_classes], transform=transform, target_transform=self.get_target_transform(i)
        )

    def __getitem__(self, i: int) -> Points:
        return self.kept.get(i) or self._points(i)


def tasks_of(classes: Classes, ways: int = 3, **kwargs: Any) -> data.CombinationMetaDataset:
    return data.CombinationMetaDataset(classes, ways, target_transform=transforms.Categorical(ways), **kwargs)


# --- splits and errors of the bases ---


@pytest.mark.parametrize("kind", [data.ClassDataset, data.MetaDataset])
def test_which_part(kind: Callable[..., Any]) -> None:
    assert kind(meta_val=True).meta_split == "val" and kind(meta_split="test").meta_test
    for given, message in (
        ({}, "expected one of 'train', 'val', 'test'.*got None"),
        ({"meta_split": "dev"}, "got 'dev'"),
        ({"meta_train": True, "meta_test": True}, "expected one of them, got train and test"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**given)


def test_what_a_base_lacks_has_a_name() -> None:
    with pytest.raises(NotImplementedError, match=r"ClassDataset: expected a property num_classes"):
        len(data.ClassDataset(meta_train=True))
    with pytest.raises(NotImplementedError, match=r"MetaDataset: expected __getitem__\(index\) -> task"):
        data.MetaDataset(meta_train=True)[0]


# --- combinations of classes ---


def test_a_task_numbers_its_classes_and_leaves_the_data_alone() -> None:
    """The original appended another target transform to a cached class each time that a task had it."""
    classes = Classes(cached=True)
    tasks = tasks_of(classes)
    for index in ((4, 0, 2), (4, 1, 2), (4, 0, 2)):
        task = tasks[index]
        labels = [y for _, y in task]
        assert len(task) == 18 and task.num_classes == 3 and sorted(set(labels)) == [0, 1, 2]
        assert all(len(set(labels[i : i + 6])) == 1 for i in (0, 6, 12))
    assert classes[4][0][1] == ("class 4", None)


def test_all_combinations_in_order() -> None:
    """The original's iteration raised a TypeError."""
    tasks = tasks_of(Classes())
    assert len(tasks) == 10 and [t.index for t in tasks][:3] == [(0, 1, 2), (0, 1, 3), (0, 1, 4)]
    loader = data.MetaDataLoader(tasks, batch_size=4, shuffle=False)
    assert [task.index for batch in loader for task in batch] == [t.index for t in tasks]
    assert len(loader) == 3


def test_more_tasks_than_an_int_holds() -> None:
    tasks = tasks_of(Classes((1,) * 4000), ways=20)
    with pytest.warns(UserWarning, match=r"more than an int holds"):
        assert len(tasks) == sys.maxsize
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (task,) = next(iter(data.MetaDataLoader(tasks)))
    assert len(set(task.index)) == 20


def test_errors_of_combinations() -> None:
    tasks = tasks_of(Classes())
    for index in (3, (0, 1), "ab"):
        with pytest.raises(ValueError, match=r"index: expected the 3 classes of a task, as dataset\[\(0, 1, 2\)\]"):
            tasks[index]
    with pytest.raises(TypeError, match=r"num_classes_per_task: expected an int, got 2.0"):
        data.CombinationMetaDataset(Classes(), 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"class_augmentations: expected a list"):
        Classes(class_augmentations=transforms.Rotation([90]))
    for kind in (data.CombinationRandomSampler, data.CombinationSequentialSampler):
        with pytest.raises(TypeError, match=r"data_source: expected a CombinationMetaDataset"):
            kind([1, 2])


def test_seeds_repeat_tasks() -> None:
    tasks = tasks_of(Classes())
    tasks.seed(3)
    first = [tasks.sample_task().index for _ in range(5)]
    tasks.seed(3)
    assert [tasks.sample_task().index for _ in range(5)] == first


# --- target and class transforms ---


def test_categorical() -> None:
    transform = transforms.Categorical(3)
    torch.manual_seed(1)
    ids = [transform(label) for label in "cabca"]
    torch.manual_seed(1)
    order = torch.randperm(3).tolist()
    assert ids == [order[0], order[1], order[2], order[0], order[1]]
    with pytest.raises(ValueError, match=r"num_classes: expected at most 3 different labels"):
        transform("d")
    assert pickle.loads(pickle.dumps(transform))("b") == order[2]  # the original's could not be pickled
    with pytest.raises(ValueError, match=r"target: expected \(label, augmentation\)"):
        transforms.DefaultTargetTransform([])("label")


@pytest.mark.parametrize("compose", [Compose, type("Compose", (Compose,), {})], ids=["ours", "another's"])
def test_a_categorical_within_a_compose_is_of_one_task_too(compose: Any) -> None:
    transform = compose([transforms.Categorical(3), lambda y: y + 10])
    tasks = data.CombinationMetaDataset(Classes(), 3, target_transform=transform)
    for index in ((0, 1, 2), (2, 3, 4)):
        assert sorted({y for _, y in tasks[index]}) == [10, 11, 12]


def test_augmentations_make_classes() -> None:
    turn = transforms.Rotation([90, 180])
    with pytest.warns(UserWarning, match=r"comes twice"):
        classes = Classes(class_augmentations=[turn, transforms.HorizontalFlip(), [transforms.Rotation(450)]])
    assert len(classes) == 20 and classes.get_class_augmentation(3) is None
    assert [repr(classes.get_class_augmentation(i)) for i in (5, 11, 19)] == [
        "Rotation(90)",
        "Rotation(180)",
        "HorizontalFlip()",
    ]
    number = transforms.DefaultTargetTransform(classes.class_augmentations)
    names = {number(classes.get_target_transform(i)(f"class {i}")) for i in (3, 8, 13)}
    assert names == {("class 3", 0), ("class 8", 1), ("class 13", 2)}
    composed = classes.get_transform(18, lambda x: x + 1)
    assert composed(torch.tensor([1, 2])).tolist() == [3, 2]


def test_images_turn_alike_as_tensors_and_as_pictures() -> None:
    from PIL import Image

    pixels = np.arange(12, dtype=np.uint8).reshape(4, 3)
    ways = [transforms.Rotation(180), transforms.HorizontalFlip(), transforms.VerticalFlip()]
    for transform in ways:
        picture = np.array(transform(Image.fromarray(pixels)))
        assert np.array_equal(picture, transform(torch.from_numpy(pixels)).numpy()), transform
    square = pixels[:3]
    turned = np.array(transforms.Rotation(90)(Image.fromarray(square)))
    assert np.array_equal(turned, transforms.Rotation(90)(torch.from_numpy(square)).numpy())
    with pytest.raises(ValueError, match=r"expected a multiple of 90 for a tensor, got 45"):
        transforms.Rotation(45)(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"Rotation\(90, 180\) is a group"):
        transforms.Rotation([90, 180])(torch.zeros(2, 2))
    with pytest.warns(UserWarning, match=r"makes no new class"):
        transforms.Rotation(360)


# --- splitters ---


def members(task: Any) -> list[tuple[int, ...]]:
    return [tuple(x.tolist()) for x, _ in task]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("splitter", "sizes"),
    [
        (lambda **k: transforms.ClassSplitter(num_train_per_class=2, num_test_per_class=3, **k), [(6, 9)] * 2),
        (
            lambda **k: transforms.WeightedClassSplitter(train_weights=0.5, test_weights=0.4, **k),
            [(3 + 4 + 5, 2 + 3 + 4), (9, 6)],
        ),
    ],
    ids=["numbers", "shares"],
)
def test_parts_never_overlap(splitter: Any, sizes: list[tuple[int, int]], shuffle: bool) -> None:
    """The original's shares overlapped where a task is of several classes."""
    for equal, expected in zip((False, True), sizes, strict=True):
        options = {"force_equal_per_class": True} if equal and sizes[0] != sizes[1] else {}
        tasks = tasks_of(Classes((6, 8, 10)), dataset_transform=splitter(shuffle=shuffle, **options))
        seen: list[set[tuple[int, ...]]] = [set(), set()]
        for _ in range(3):
            task = tasks[(0, 1, 2)]
            assert isinstance(task, OrderedDict) and (len(task["train"]), len(task["test"])) == expected
            for have, part in zip(seen, task.values(), strict=True):
                assert len(set(members(part))) == len(part)
                have |= set(members(part))
        assert not seen[0] & seen[1]  # nor does what is trained on once become a test another time
        assert (len(seen[0]), len(seen[1])) == expected


def test_a_task_with_targets_is_split_by_class() -> None:
    class Labelled(data.Task):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> Any:
            return (i, i % 3)

    parts = transforms.ClassSplitter(Labelled(0, 3), num_samples_per_class={"a": 1, "b": 2, "c": 1})
    assert {name: sorted(y for _, y in part) for name, part in parts.items()} == {
        "a": [0, 1, 2],
        "b": [0, 0, 1, 1, 2, 2],
        "c": [0, 1, 2],
    }
    with pytest.raises(ValueError, match=r"expected the 4 classes of its num_classes, got 3"):
        transforms.ClassSplitter(Labelled(0, 4), num_train_per_class=1)
    with pytest.raises(ValueError, match=r"expected at least 5 samples of every class for all parts, got 4"):
        transforms.ClassSplitter(Labelled(0, 3), num_train_per_class=5)


def test_errors_of_splitters() -> None:
    with pytest.raises(ValueError, match=r"num_samples_per_class: expected at least one part"):
        transforms.ClassSplitter()
    with pytest.raises(ValueError, match=r"weights: expected a sum of at most 1"):
        transforms.WeightedClassSplitter(train_weights=0.6, test_weights=0.6)
    with pytest.raises(TypeError, match=r"max_num_samples: expected an int, or {part: int} for train"):
        transforms.WeightedClassSplitter(train_weights=0.6, max_num_samples={"test": 1})
    with pytest.raises(TypeError, match=r"task: expected a Task, a MetaDataset or None"):
        transforms.ClassSplitter([1, 2], num_train_per_class=1)
    with pytest.raises(NotImplementedError, match=r"Splitter: expected get_indices_task"):
        transforms.Splitter({"a": 1})(toy.Sinusoid(3, num_tasks=1)[0])


# --- toy tasks, in numbers of the original's order of draws ---


def drawn(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed)


def test_sinusoids() -> None:
    tasks = toy.Sinusoid(4, num_tasks=7, noise_std=0.1)
    tasks.seed(5)
    rng = drawn(5)
    amplitudes, phases = rng.uniform(0.1, 5.0, 7), rng.uniform(0, np.pi, 7)
    x = rng.uniform(-5, 5, (4, 1))
    y = amplitudes[3] * np.sin(x - phases[3]) + 0.1 * rng.randn(4, 1)
    for i, (a, b) in enumerate(tasks[3]):
        np.testing.assert_array_equal((a, b), (x[i], y[i]))
        if i == 3:
            break


def test_harmonics() -> None:
    tasks = toy.Harmonic(4, num_tasks=7)
    tasks.seed(5)
    rng = drawn(5)
    m, w = rng.uniform(-4, 4, 7)[2], rng.uniform(5, 7, 7)[2]
    b, a = rng.uniform(0, 2 * np.pi, (7, 2))[2], rng.randn(7, 2)[2]
    x = m + rng.randn(4, 1)
    np.testing.assert_array_equal(tasks[2].whole()[0], x)
    np.testing.assert_allclose(tasks[2].whole()[1].shape, (4, 1))
    tasks.seed(5)
    y = a[0] * np.sin(w * x + b[0]) + a[1] * np.sin(2 * w * x + b[1])
    again = toy.Harmonic(4, num_tasks=7)
    again.seed(5)
    np.testing.assert_allclose(again[2].whole()[1], y)


def test_lines_and_sinusoids() -> None:
    tasks = toy.SinusoidAndLine(5, num_tasks=20)
    assert tasks.is_sinusoid.sum() == 10
    line = int(np.flatnonzero(~tasks.is_sinusoid)[0])
    x, y = tasks[line].whole()
    np.testing.assert_allclose(y, tasks.intercepts[line] + tasks.slopes[line] * x)


@pytest.mark.parametrize("helper", [toy.helpers.sinusoid, toy.helpers.harmonic])
def test_helpers(helper: Any) -> None:
    assert {n: len(part) for n, part in helper(5, seed=0)[0].items()} == {"train": 5, "test": 5}
    with pytest.warns(UserWarning, match=r"shots: not used"):
        parts = helper(5, test_shots=3, num_samples_per_task=10)[0]
    assert {n: len(part) for n, part in parts.items()} == {"train": 7, "test": 3}
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"test_shots: expected fewer than the 10 samples"):
        helper(5, test_shots=10, num_samples_per_task=10)


# --- loaders ---


@pytest.mark.parametrize("transform", [None, lambda x: x], ids=["together", "one by one"])
def test_batches_are_the_tasks_samples(transform: Any) -> None:
    tasks = toy.helpers.sinusoid(3, test_shots=4, seed=2, num_tasks=6, transform=transform)
    tasks.amplitudes, tasks.phases  # noqa: B018  # drawn before the samples in any case
    batch = next(iter(data.BatchMetaDataLoader(tasks, batch_size=3, shuffle=False)))
    again = toy.helpers.sinusoid(3, test_shots=4, seed=2, num_tasks=6)
    assert isinstance(batch, dict) and list(batch) == ["train", "test"]
    for i in range(3):
        for name, part in again[i].items():
            expected = [np.stack(side) for side in zip(*(part[j] for j in range(len(part))), strict=True)]
            for found, wanted in zip(batch[name], expected, strict=True):
                assert found.dtype == torch.float64
                np.testing.assert_array_equal(found[i].numpy(), wanted)


def test_a_task_that_is_not_split_and_one_that_cannot_be_batched() -> None:
    x, y = next(iter(data.BatchMetaDataLoader(toy.Sinusoid(10, num_tasks=8), batch_size=4)))
    assert x.shape == y.shape == (4, 10, 1)
    with pytest.raises(TypeError, match=r"task: expected a Dataset or an OrderedDict of such"):
        next(iter(data.BatchMetaDataLoader([[1, 2]])))


def test_classification_batches() -> None:
    splitter = transforms.ClassSplitter(num_support_per_class=1, num_query_per_class=2)
    batch = next(iter(data.BatchMetaDataLoader(tasks_of(Classes(), dataset_transform=splitter), batch_size=2)))
    (sx, sy), (qx, qy) = batch["support"], batch["query"]
    assert sx.shape == (2, 3, 2) and qx.shape == (2, 6, 2) and qy.dtype == torch.int64
    assert all(sorted(row.tolist()) == [0, 1, 2] for row in sy)
    for t in range(2):  # a label means the same class in both parts
        of = dict(zip(sx[t, :, 0].tolist(), sy[t].tolist(), strict=True))
        assert [of[c] for c in qx[t, :, 0].tolist()] == qy[t].tolist()


def test_workers_draw_samples_of_their_own() -> None:
    """In the original all workers had one process's random numbers: the same inputs came once a worker."""
    tasks = toy.Sinusoid(4, num_tasks=4)
    tasks.seed(0)
    loader = data.BatchMetaDataLoader(tasks, batch_size=2, shuffle=False, num_workers=2)
    first, second = ((x, y) for x, y in loader)
    assert not torch.equal(first[0], second[0])
    alone = toy.Sinusoid(4, num_tasks=4)
    alone.seed(0)
    for number, (x, y) in enumerate((first, second)):  # but the curves are those of the one data set
        for i in range(2):
            t = 2 * number + i
            np.testing.assert_allclose(y[i], alone.amplitudes[t] * np.sin(x[i].numpy() - alone.phases[t]))


class SameTask(data.MetaDataset):
    """One task of two classes under every index."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self._transformed(Labelled(np.arange(40) % 2))


class Labelled(data.Task):
    """Samples 0..N-1 with labels of any kind."""

    def __init__(self, labels: Any) -> None:
        super().__init__(0, 2)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[float, Any]:
        return float(index), self.labels[index]


def test_workers_split_in_orders_of_their_own_and_the_same_by_the_seed() -> None:
    def epochs() -> list[list[tuple[float, ...]]]:
        torch.manual_seed(0)
        tasks = transforms.ClassSplitter(SameTask(meta_train=True), num_train_per_class=8, num_test_per_class=2)
        tasks.seed(0)
        loader = data.BatchMetaDataLoader(tasks, shuffle=False, num_workers=2)
        return [[tuple(batch["train"][0].flatten().tolist()) for batch in loader] for _ in range(2)]

    first = epochs()
    assert len({order for epoch in first for order in epoch}) == 16  # of 8 tasks, twice
    assert len({frozenset(order) for epoch in first for order in epoch}) == 1
    assert epochs() == first


def test_tasks_drawn_in_workers_differ_and_leave_the_curves() -> None:
    class Drawn(torch.utils.data.IterableDataset[Any]):
        def __init__(self) -> None:
            self.tasks = toy.Sinusoid(4, num_tasks=1000)
            self.tasks.seed(0)

        def __iter__(self) -> Any:
            for _ in range(3):
                task = self.tasks.sample_task()
                yield task.index, self.tasks.amplitudes[task.index]

    alone = toy.Sinusoid(4, num_tasks=1000)
    alone.seed(0)
    rows = list(torch.utils.data.DataLoader(Drawn(), batch_size=None, num_workers=2))
    assert len({index for index, _ in rows}) == 6
    assert all(alone.amplitudes[index] == amplitude for index, amplitude in rows)


LABELS = np.arange(8) % 2


@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None], torch.tensor(LABELS), torch.tensor(LABELS)[:, None]])
def test_labels_of_a_task_may_stand_in_a_column(labels: Any) -> None:
    parts = transforms.ClassSplitter(Labelled(labels), num_train_per_class=1, num_test_per_class=2)
    assert [parts["train"][i][1].item() for i in range(2)] == [0, 1]
    assert [parts["test"][i][1].item() for i in range(4)] == [0, 0, 1, 1]


def test_subsets_and_copies() -> None:
    task = toy.Sinusoid(5, num_tasks=1)[0]
    some = data.SubsetTask(task, [4, 1], target_transform=lambda y: y * 0)
    assert len(some) == 2 and some[0][1] == 0 and task[4][1] != 0 and some.whole() is None
    assert hash(some) == hash((0, (4, 1))) and hash(task) == hash(0)
    np.testing.assert_array_equal(data.SubsetTask(task, [4, 1]).whole()[0][0], task[4][0])


# --- data from files ---


def test_omniglot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTML_CACHE", str(tmp_path / "cache"))
    root = make_omniglot(tmp_path / "omniglot").parent
    tasks = datasets.helpers.omniglot(str(root), 1, 5, test_shots=2, meta_train=True, use_vinyals_split=False, seed=0)
    assert len(tasks.dataset) == 13 * 4
    batch = next(iter(data.BatchMetaDataLoader(tasks, batch_size=2)))
    (sx, sy), (qx, _) = batch["train"], batch["test"]
    assert sx.shape == (2, 5, 1, 28, 28) and qx.shape == (2, 10, 1, 28, 28) and sx.dtype == torch.float32
    assert sx.min() >= 0 and 0.5 < sx.max() <= 1 and sx.mean() < 0.3  # ink is bright
    assert sorted(sy[0].tolist()) == [0, 1, 2, 3, 4]
    plain = data.NonEpisodicWrapper(tasks)
    assert len(plain) == 13 * 6 * 4 and plain.num_classes == 52
    # the original took the last sample of a class for the first of the next
    assert [plain[i][1] for i in (0, 5, 6, 13 * 6 + 6)] == [
        ("images_background/Aleph/character01", 0),
        ("images_background/Aleph/character01", 0),
        ("images_background/Aleph/character02", 0),
        ("images_background/Aleph/character02", 1),
    ]
    torch.testing.assert_close(transforms.Rotation(90)(_pixels(plain[6][0])), _pixels(plain[13 * 6 + 6][0]))
    with pytest.raises(IndexError, match=r"index: expected 0..311"):
        plain[312]
    with pytest.raises(ValueError, match=r"dataset: expected a CombinationMetaDataset"):
        data.NonEpisodicWrapper(toy.Sinusoid(3))  # type: ignore[arg-type]


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image))


def test_omniglots_split_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTML_CACHE", str(tmp_path / "cache"))
    root = make_omniglot(tmp_path / "data")
    with pytest.raises(DataError, match=r"vinyals_val_labels.json.*use_vinyals_split=False"):
        datasets.Omniglot(str(root), 2, meta_val=True)
    labels = [["images_background", "Beth", "character02"], ["images_evaluation", "Gimel", "character01"]]
    (root / "vinyals_val_labels.json").write_text(json.dumps(labels))
    tasks = datasets.Omniglot(str(root), 2, meta_val=True)
    assert tasks.dataset.labels == labels and len(tasks) == 1
    assert tasks[(1, 0)][0][1] == ("images_evaluation/Gimel/character01", 0)
    (root / "vinyals_val_labels.json").write_text(json.dumps([["images_background", "Beth", "character99"]]))
    with pytest.raises(DataError, match=r"got images_background/Beth/character99"):
        datasets.Omniglot(str(root), 2, meta_val=True)
    with pytest.raises(ValueError, match=r"use_vinyals_split: expected True for the part 'val'"):
        datasets.Omniglot(str(root), 2, meta_val=True, use_vinyals_split=False)
    with pytest.raises(DataError, match=r"download: expected False"):
        datasets.Omniglot(str(root), 2, meta_train=True, download=True)


def test_data_sets_that_are_absent_say_so_when_used() -> None:
    for use in (datasets.MiniImagenet, datasets.helpers.miniimagenet, datasets.helpers_tabular.letter, datasets.Bach):
        with pytest.raises(DataError, match=r"not here.*ClassDataset.*EpisodeDataset"):
            use("folder", shots=1, ways=5)
    with pytest.raises(AttributeError, match=r"no attribute 'Nothing'"):
        datasets.Nothing  # noqa: B018


# --- heads ---


def test_heads_in_closed_form() -> None:
    x, y = torch.randn(2, 6, 4, dtype=torch.float64), torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)
    prototypes = torchmeta.get_prototypes(x, y, 4)
    torch.testing.assert_close(prototypes[:, :3], x.view(2, 3, 2, 4).mean(2))
    assert (prototypes[:, 3] == 0).all()
    loss = torchmeta.prototypical_loss(prototypes, x, y)
    torch.testing.assert_close(loss, F.cross_entropy(-torch.cdist(x, prototypes).square().flatten(0, 1), y.flatten()))
    q, target = torch.randn(2, 5, 4, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.long)
    attention = F.cosine_similarity(q.unsqueeze(2), x.unsqueeze(1), dim=-1).softmax(-1)
    probabilities = attention @ F.one_hot(y, 3).to(attention)  # [T, M, C]
    torch.testing.assert_close(torchmeta.matching_probas(x, y, q, 3), probabilities.mT)
    torch.testing.assert_close(
        torchmeta.matching_loss(x, y, q, target, 3), F.nll_loss(probabilities.log().flatten(0, 1), target.flatten())
    )
    with pytest.warns(UserWarning, match=r"num_classes: not given"):
        assert torchmeta.ridge_regression(x[0], y[0], 0.1).weight.shape == (3, 4)
    with pytest.raises(ValueError, match=r"targets: expected values \[N, O\] or class ids"):
        torchmeta.ridge_regression(x[0], torch.zeros(6), 0.1)


def test_hardness() -> None:
    x, y = torch.rand(2, 4, 3, 8, 6), torch.tensor([[0, 0, 1, 1]] * 2)

    def backbone(images: Tensor) -> Tensor:
        assert images.shape == (8, 3, 224, 224) and images[..., :108, :].eq(0).all()
        return images[:, :, 108:116, 109:115].flatten(1)[:, :10]

    found = torchmeta.hardness_metric({"support": (x, y), "query": (x, y)}, 2, backbone=backbone)
    assert found.shape == (2,) and found.isfinite().all()
    with pytest.raises(ValueError, match=r"expected 'train' or 'support', and 'test' or 'query'; got support"):
        torchmeta.hardness_metric({"support": (x, y)}, 2)
    with pytest.raises(ValueError, match=r"expected RGB images"):
        torchmeta.hardness_metric({"train": (x[:, :, :1], y), "test": (x, y)}, 2)
