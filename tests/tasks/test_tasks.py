"""Tasks: batches, episodes over any dataset, and the seeded streams."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

from mtml.tasks import (
    DataError,
    EpisodeDataset,
    ImageEpisodes,
    Prefetch,
    Sinusoids,
    TaskBatch,
    TaskStream,
    collate,
    split_support_query,
)
from mtml.tasks.image_episodes import distinct
from mtml.tasks.sinusoids import draw_sinusoids


def equal(a: TaskBatch, b: TaskBatch) -> bool:
    return all(torch.equal(x, y) if x is not None else y is None for x, y in zip(a, b, strict=True))


class TestTaskBatch:
    def test_to_changes_floats_only_and_reaches_nested_tensors(self):
        x, y = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
        batch = TaskBatch((x, {"t": x}), y, [x], y, torch.ones(2, 3)).to("cpu", torch.float64)
        assert batch.sx[0].dtype == batch.sx[1]["t"].dtype == batch.qx[0].dtype == torch.float64
        assert batch.support_mask.dtype == torch.float64
        assert batch.sy.dtype == torch.long
        assert batch.query_mask is None
        assert batch.tasks == 2

    def test_to_takes_another_tensor_and_a_device(self):
        x = torch.zeros(2, 3)
        assert TaskBatch(x, x, x, x).to(torch.zeros(1, dtype=torch.float64)).qy.dtype == torch.float64
        assert TaskBatch(x, x, x, x).to(torch.device("meta")).sx.device.type == "meta"

    def test_a_field_that_is_no_tensor_is_named(self):
        with pytest.raises(TypeError, match="got str"):
            TaskBatch("sx", None, None, None).to("cpu")


class TestSplit:
    def test_first_shots_of_each_class_in_order(self):
        x, y = torch.arange(7.0), torch.tensor([2, 0, 2, 0, 2, 0, 0])
        task = split_support_query(x, y, 2)
        assert task.sx.tolist() == [0, 1, 2, 3]
        assert task.sy.tolist() == [2, 0, 2, 0]
        assert task.qx.tolist() == [4, 5, 6]

    def test_several_tasks_at_once(self):
        x, y = torch.arange(8.0).reshape(2, 4), torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
        task = split_support_query(x, y, 1)
        assert task.sx.tolist() == [[0, 2], [4, 5]]
        assert task.qx.tolist() == [[1, 3], [6, 7]]
        assert task.support_mask is None

    def test_real_targets_split_by_position(self):
        x, y = torch.randn(5, 2), torch.randn(5, 1)
        task = split_support_query(x, y, 3)
        assert torch.equal(task.qy, y[3:])

    @pytest.mark.parametrize(
        ("y", "shots", "message"),
        [
            (torch.tensor([0, 0, 1]), 1, "got 1 of class 1"),
            (torch.zeros(3), 3, "fewer than the 3 samples"),
            (torch.tensor([0, 0]), 1, "one target per sample"),
            (torch.tensor([0, 0, 0]), 0, "positive int"),
        ],
    )
    def test_errors(self, y, shots, message):
        with pytest.raises(ValueError, match=message):
            split_support_query(torch.zeros(3, 2), y, shots)


class TestCollate:
    def task(self, shots: int, queries: int) -> TaskBatch:
        ids = torch.ones(shots, dtype=torch.long), torch.ones(queries, dtype=torch.long)
        return TaskBatch(torch.ones(shots, 2), ids[0], torch.ones(queries, 2), ids[1])

    def test_equal_sizes_need_no_mask(self):
        batch = collate([self.task(3, 2), self.task(3, 2)])
        assert batch.sx.shape == (2, 3, 2)
        assert batch.support_mask is None and batch.query_mask is None

    @settings(max_examples=20, deadline=None)
    @given(sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=4))
    def test_padding_is_masked_and_nothing_else(self, sizes):
        batch = collate([self.task(s, q) for s, q in sizes])
        for field, mask, column in ((batch.sx, batch.support_mask, 0), (batch.qx, batch.query_mask, 1)):
            counts = [size[column] for size in sizes]
            assert field.shape[1] == max(counts)
            assert field[..., 0].sum(1).tolist() == counts
            if len(set(counts)) == 1:
                assert mask is None
            else:
                assert torch.equal(mask, field[..., 0])

    def test_own_masks_stay(self):
        weighted = self.task(2, 1)._replace(support_mask=torch.tensor([0.5, 2.0]))
        batch = collate([weighted, self.task(3, 1)])
        assert batch.support_mask.tolist() == [[0.5, 2.0, 0.0], [1.0, 1.0, 1.0]]

    def test_structured_inputs(self):
        x = torch.ones(2, 3)
        batch = collate([({"a": x, "b": (x, x)}, x, {"a": x, "b": (x, x)}, x)] * 2)
        assert batch.sx["b"][1].shape == (2, 2, 3)

    @pytest.mark.parametrize(("tasks", "message"), [([], "at least one"), ([(1, 2, 3)], r"got \[3\] fields")])
    def test_errors(self, tasks, message):
        with pytest.raises(ValueError, match=message):
            collate(tasks)


class Squares(Dataset):
    """Sample i is i squared, of class i modulo 4; without a table of labels."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.tensor([float(index) ** 2]), index % 4


class TestEpisodeDataset:
    x, y = torch.arange(60.0)[:, None], torch.arange(60) % 6

    @pytest.mark.parametrize("form", ["pair", "arrays", "tensors", "plain"])
    def test_every_kind_of_dataset(self, form):
        data = {
            "pair": (self.x, self.y),
            "arrays": (self.x.numpy(), self.y.numpy()),
            "tensors": TensorDataset(self.x, self.y),
            "plain": Squares(),
        }[form]
        task = EpisodeDataset(data, ways=3, shots=2, queries=4)[5]
        assert task.sx.shape == (6, 1) and task.qx.shape == (12, 1)
        assert task.sy.tolist() == [0, 0, 1, 1, 2, 2]
        assert len(set(task.sx.flatten().tolist() + task.qx.flatten().tolist())) == 18
        roots = task.sx.flatten().sqrt() if form == "plain" else task.sx.flatten()
        classes = (roots.long() % (4 if form == "plain" else 6)).reshape(3, 2)
        assert torch.equal(classes[:, 0], classes[:, 1])
        assert len(classes[:, 0].unique()) == 3

    def test_seed_epoch_and_index_decide(self):
        data = EpisodeDataset((self.x, self.y), 3, 1, 2, seed=1)
        again = EpisodeDataset((self.x, self.y), 3, 1, 2, seed=1)
        other = EpisodeDataset((self.x, self.y), 3, 1, 2, seed=2)
        assert equal(data[3], again[3])
        assert not equal(data[3], data[4]) and not equal(data[3], other[3])
        again.set_epoch(1)
        assert not equal(data[3], again[3])

    def test_in_a_loader_with_workers(self):
        data = EpisodeDataset((self.x, self.y), 3, 1, 2, episodes=10)
        loader = DataLoader(data, batch_size=4, collate_fn=collate, num_workers=2)
        batches = list(loader)
        assert [batch.tasks for batch in batches] == [4, 4, 2]
        assert equal(batches[0], collate([data[i] for i in range(4)]))
        assert len(list(data)) == 10

    def test_classes_with_too_few_samples_are_left_out(self):
        y = torch.tensor([0] * 20 + [1] * 20 + [2] * 19 + [3])
        task = EpisodeDataset((self.x, y), 3, 1, 1)[0]
        assert 59.0 not in task.sx.tolist()
        with pytest.raises(DataError, match=r"expected 4 classes .* got 3 such among 4"):
            EpisodeDataset((self.x, y), 4, 1, 1)

    def test_errors(self):
        with pytest.raises(DataError, match="integer class id"):
            EpisodeDataset((self.x, torch.rand(60)), 2, 1, 1)
        with pytest.raises(ValueError, match="ways: expected a positive int"):
            EpisodeDataset((self.x, self.y), 0, 1, 1)
        with pytest.raises(IndexError):
            EpisodeDataset((self.x, self.y), 2, 1, 1, episodes=3)[3]


class TestSinusoids:
    def test_tasks_are_those_of_the_paper(self):
        drawn = draw_sinusoids((4000,), 30, torch.Generator().manual_seed(0), torch.float64)
        for value, low, high in ((drawn.amplitude, 0.1, 5.0), (drawn.phase, 0.0, math.pi), (drawn.x, -5.0, 5.0)):
            assert low <= value.min() and value.max() <= high
            assert abs(value.mean() - (low + high) / 2) < 0.02 * (high - low)
        torch.testing.assert_close(drawn.y, drawn.amplitude * (drawn.x - drawn.phase).sin())

    def test_frequencies_vary_where_asked(self):
        generator = torch.Generator().manual_seed(0)
        drawn = draw_sinusoids((500,), 9, generator, torch.float64, frequency=(0.8, 1.2))
        assert 0.8 <= drawn.frequency.min() < 0.81 and 1.19 < drawn.frequency.max() <= 1.2
        torch.testing.assert_close(drawn.y, drawn.amplitude * (drawn.frequency * drawn.x - drawn.phase).sin())
        torch.testing.assert_close(drawn.curve(drawn.x), drawn.y)

    def test_shapes_and_dtype(self):
        batch = next(Sinusoids(3, 7, tasks=4, dtype=torch.float64, block=2))
        assert [tuple(v.shape) for v in batch[:4]] == [(4, 3, 1), (4, 3, 1), (4, 7, 1), (4, 7, 1)]
        assert all(v.dtype == torch.float64 and v.is_contiguous() for v in batch[:4])

    def test_support_and_query_belong_to_one_sinusoid(self):
        """Three points settle A sin(x - phase) = a sin x + b cos x, so the others can be predicted."""
        batch = Sinusoids(10, 10, tasks=6, dtype=torch.float64).batch(700)
        basis = torch.cat([batch.sx.sin(), batch.sx.cos()], -1)
        weights = torch.linalg.lstsq(basis, batch.sy).solution
        torch.testing.assert_close(torch.cat([batch.qx.sin(), batch.qx.cos()], -1) @ weights, batch.qy)

    def test_resumes_in_the_middle_of_a_block(self):
        straight = Sinusoids(2, tasks=3, seed=5, block=8)
        batches = [next(straight) for _ in range(20)]
        first = Sinusoids(2, tasks=3, seed=5, block=8)
        for _ in range(11):
            next(first)
        second = Sinusoids(2, tasks=3, seed=5, block=8)
        second.load_state_dict(first.state_dict())
        assert all(equal(next(second), batch) for batch in batches[11:])

    def test_seeds_and_streams_are_independent(self):
        one = Sinusoids(seed=1).batch(0)
        assert not equal(one, Sinusoids(seed=2).batch(0))
        assert not equal(one, Sinusoids(seed=1, stream=1).batch(0))
        assert not equal(one, Sinusoids(seed=1).batch(512))

    def test_is_cheap(self):
        """The run of 70 000 iterations leaves tasks about 25 us an iteration; the bound allows for a busy machine."""
        stream = Sinusoids(10, tasks=25)
        next(stream)
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(512):
                next(stream)
            best = min(best, (time.perf_counter() - start) / 512)
        assert best < 100e-6

    def test_errors(self):
        with pytest.raises(ValueError, match="shots: expected a positive int, got 0"):
            Sinusoids(0)
        with pytest.raises(ValueError, match="tasks"):
            Sinusoids(tasks=-1)


class TestImageEpisodes:
    # every pixel of drawing d of class c tells both: 10 * c + d
    images = (10 * np.arange(12)[:, None, None] + np.arange(8)[:, None] + np.zeros(5)).astype(np.uint8)

    def test_tasks(self):
        batch = next(ImageEpisodes(self.images, ways=4, shots=2, queries=3, tasks=7))
        assert batch.sx.shape == (7, 8, 5) and batch.qx.shape == (7, 12, 5)
        assert batch.sy[3].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and batch.qy.shape == (7, 12)
        assert batch.sx.dtype == torch.float32 and batch.sx.max() <= 1
        support = (batch.sx[..., 0] * 255).round().long().reshape(7, 4, 2)
        query = (batch.qx[..., 0] * 255).round().long().reshape(7, 4, 3)
        codes = torch.cat([support, query], -1)
        for task in codes:
            classes = task // 10
            assert (classes == classes[:, :1]).all() and len(classes[:, 0].unique()) == 4
            assert len(task.unique()) == task.numel()

    def test_resumes(self):
        straight = ImageEpisodes(self.images, seed=3)
        batches = [next(straight) for _ in range(5)]
        later = ImageEpisodes(self.images, seed=3)
        later.load_state_dict({"position": 3})
        assert equal(next(later), batches[3])
        assert not equal(batches[3], batches[4])

    @pytest.mark.parametrize(("count", "total"), [(5, 5), (5, 12), (3, 200), (1, 40)])
    def test_draws_are_distinct_and_uniform(self, count, total):
        drawn = distinct(np.random.default_rng(0), 20_000, count, total)
        assert drawn.shape == (20_000, count)
        assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
        for column in drawn.T:
            seen = np.bincount(column, minlength=total) / len(drawn)
            assert abs(seen - 1 / total).max() < 5 * math.sqrt(1 / total / len(drawn))

    def test_shifts_move_whole_pictures(self):
        picture = np.zeros((5, 5), np.uint8)
        picture[2, 2] = 255
        images = np.tile(picture.reshape(-1), (6, 8, 1))
        batch = next(ImageEpisodes(images, ways=5, shots=2, queries=4, tasks=20, shift=2))
        places = batch.qx.reshape(-1, 25).argmax(-1)
        assert set(places.tolist()) == set(range(25))
        assert torch.equal(batch.qx.sum(-1), torch.ones(20, 20))
        assert equal(batch, ImageEpisodes(images, ways=5, shots=2, queries=4, tasks=20, shift=2).batch(0))

    def test_shift_needs_squares(self):
        with pytest.raises(ValueError, match="square images"):
            ImageEpisodes(self.images, shift=1)

    def test_too_few(self):
        with pytest.raises(DataError, match="13 ways need 13 classes, but there are 12"):
            ImageEpisodes(self.images, ways=13)
        with pytest.raises(DataError, match=r"5 shots \+ 4 queries need 9 drawings of every class, but there are 8"):
            ImageEpisodes(self.images, shots=5, queries=4)


class Failing(TaskStream):
    """Three batches, then an error."""

    def batch(self, index):
        if index == 3:
            raise DataError("no more")
        return TaskBatch(*[torch.full((1,), float(index))] * 4)


class TestPrefetch:
    def test_same_batches_as_the_source(self):
        images = TestImageEpisodes.images
        source = ImageEpisodes(images, seed=1)
        with Prefetch(ImageEpisodes(images, seed=1), depth=3) as ahead:
            assert all(equal(next(ahead), next(source)) for _ in range(10))
            assert ahead.position == 10

    def test_resumes_where_it_was_read_not_where_the_thread_is(self):
        images = TestImageEpisodes.images
        with Prefetch(ImageEpisodes(images)) as first, Prefetch(ImageEpisodes(images)) as second:
            for _ in range(4):
                next(first)
            next(second)
            second.load_state_dict(first.state_dict())
            assert equal(next(second), ImageEpisodes(images).batch(4))

    def test_errors_come_in_their_turn(self):
        with Prefetch(Failing()) as stream:
            assert [float(next(stream).sx) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(DataError, match="no more"):
                next(stream)

    def test_close_ends_the_thread_and_iterating_goes_on(self):
        stream = Prefetch(Sinusoids(tasks=2, block=4), depth=1)
        one = next(stream)
        thread = stream._thread
        stream.close()
        assert not thread.is_alive()
        assert not equal(next(stream), one) and stream.position == 2
        stream.close()

    def test_depth(self):
        with pytest.raises(ValueError, match="depth"):
            Prefetch(Sinusoids(), depth=0)
