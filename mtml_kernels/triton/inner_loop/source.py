"""The text of a launch's kernel: one function for each job, and one that sends every program to its job.

A job's program owns one tile [BM, BC] of a task's result, flattened to rows m and columns c. It is written as

    acc = the product's terms, added up over blocks of the depth k; or a sum over rows; or nothing
    v0, v1, ... = the pointwise parts, in order, of acc and of planes read at the tile
    stores of what is read later

Where a pooling ends the job, rows m are its windows, and the last two lines stand in a loop over a window's points.
Where a program takes several tiles, all of them stand in a loop, and its shares of sums are stored after it.

Sizes and strides are literals: what a compiler knows to be divisible by 16 it loads in whole words, and without that
every product here spills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtml_kernels.schedule.call import ABSENT, Part
from mtml_kernels.schedule.kernels import Loss, Normalisation
from mtml_kernels.triton.inner_loop.conv_text import WAYS, strides_of, window_of
from mtml_kernels.triton.inner_loop.expressions import EXPRESSIONS
from mtml_kernels.triton.inner_loop.jobs import Job, Launch, Operand, Phase, Product, Reading, Term, data_of
from mtml_kernels.triton.inner_loop.loss_text import judged
from mtml_kernels.triton.inner_loop.policy import Tile, blocks, depth_of_piece, programs, tile_of
from mtml_kernels.triton.inner_loop.pool import POOLS, Panes
from mtml_kernels.triton.inner_loop.pool_text import after_panes, before_panes, gathered, in_pane, pane_lines
from mtml_kernels.triton.inner_loop.share_text import adding, starting, storing

__all__ = ["kernel_text"]

Operands = Mapping[int, Operand]  # by plane
WIDE_INDEX = 2**31  # elements from which on an index takes 64 bits


def kernel_text(
    launch: Launch, operands: Operands, stored: Operands, precision: str, interpreted: bool
) -> tuple[str, int]:
    """The source of `launched(*operands, *stored)`, and how many programs it takes.

    Args:
        launch: its jobs.
        operands: what they read, by plane.
        stored: the results that are to be written.
        precision: of products of float32: "ieee", "tf32x3" or "tf32".
        interpreted: for Triton's interpreter, whose products in half precision are wrong: they are taken in float32.
    """
    names = [operand.name for operand in (*operands.values(), *stored.values())]
    text, calls, count = [], [], 0
    for i, job in enumerate(launch.jobs):
        writer = _JobText(job, operands, stored, precision, interpreted)
        text += ["@triton.jit", f"def job{i}(pid, {', '.join(names)}):", *writer.lines(), "", ""]
        first, count = count, count + programs(job, writer.tile)
        calls.append((first, count, f"job{i}(pid - {first}, {', '.join(names)})"))
    text += ["@triton.jit", f"def launched({', '.join(names)}):", "    pid = tl.program_id(0)"]
    for first, last, call in calls:
        text.append(f"    if (pid >= {first}) & (pid < {last}):" if len(calls) > 1 else "    if True:")
        text.append(f"        {call}")
    return "\n".join([*text, ""]), count


def _groups(job: Job) -> int:
    return job.product.groups if job.product is not None else 1


class _JobText:
    """Writes one job."""

    def __init__(self, job: Job, operands: Operands, stored: Operands, precision: str, interpreted: bool) -> None:
        self.job, self.operands, self.stored = job, operands, stored
        self.precision, self.interpreted = precision, interpreted
        self.space = job.space
        every = [*operands.values(), *stored.values()]
        self.type = "tl.float64" if any(o.dtype == "float64" for o in every) else "tl.float32"
        self.tile: Tile = tile_of(job, self.type)
        self.names: dict[tuple[int, int], str] = {}
        self.body: list[str] = []

    def lines(self) -> list[str]:
        """The body of the function."""
        self._head()
        shares = [(i, share, self.stored[share.plane]) for i, share in enumerate(self.job.shares)]
        for i, share, plane in shares:
            self.body += starting(i, share, plane, self.tile.cols, self.type)
        outside, self.body = self.body, []
        self._of_tile()
        inside, repeat = self.body, self.tile.repeat
        if repeat > 1:
            inside = [f"for i in range(0, {repeat}):", *(f"    {line}" for line in inside)]
        self.body = [*outside, *inside]
        for i, share, plane in shares:
            self.body += storing(i, share, plane)
        return [f"    {line}" for line in self.body]

    def _of_tile(self) -> None:
        self._rows()
        if self.job.product is not None:
            self._product(self.job.product)
        elif self.job.of_shares:
            self._sum_of_shares()
        elif self.job.weighed is not None:
            self._weighed_sum(self.job.weighed)
        elif self.job.summed:
            self._sum()
        held: dict[int, str] = {} if self.job.first is None else {self.job.first: "acc"}
        if self.job.pool is not None and self.job.panes is not None:
            self._panes(self.job.pool, self.job.panes)
        else:
            self._parts(held)
        for i, share in enumerate(self.job.shares):
            data = {role: self._operand(plane, held, -1) for role, plane in data_of(share.part).items()}
            self.body += adding(i, share, self.stored[share.plane], data)

    # --- where the tile lies ----------------------------------------------------------------------------------------

    def _own(self) -> tuple[int, int, bool]:
        """Rows and columns of a group, and whether groups are of rows."""
        groups, rows, cols = _groups(self.job), self.job.rows, self.space.cols
        by_rows = self.job.product is not None and self.job.product.rows_grouped
        return (rows // groups, cols, True) if by_rows else (rows, cols // groups, False)

    def _head(self) -> None:
        tile, groups, (_, own_cols, by_rows) = self.tile, _groups(self.job), self._own()
        blocks_r, blocks_c = blocks(self.job, tile)
        each = blocks_r * blocks_c * groups  # programs of a piece
        self.body += [
            f"task = (pid // {each * self._pieces}){self.wide}",
            *([f"piece = pid // {each} % {self._pieces}"] if self._pieces > 1 else []),
            f"group = pid // {blocks_r * blocks_c} % {groups}",
            f"chunk = pid // {blocks_c} % {blocks_r}",
            f"c = pid % {blocks_c} * {tile.cols} + tl.arange(0, {tile.cols})[None, :]",
            f"live_c = c < {own_cols}",
        ]
        if groups > 1 and not by_rows:
            self.body += [f"c += group * {own_cols}"]

    def _rows(self) -> None:
        tile, (own_rows, _, by_rows) = self.tile, self._own()
        start = f"chunk * {tile.rows}" if tile.repeat == 1 else f"(chunk * {tile.repeat} + i) * {tile.rows}"
        self.body += [
            f"m = {start} + tl.arange(0, {tile.rows})[:, None]",
            f"live_m = m < {own_rows}",
            "live = live_m & live_c",
        ]
        if self.job.shares:
            self.body += [f"count = tl.maximum(tl.minimum({own_rows} - {start}, {tile.rows}), 0)"]
        if by_rows and _groups(self.job) > 1:
            self.body += [f"m += group * {own_rows}"]
        if self.job.product is not None and self.job.product.phase is not None:
            self._pixels(self.job.product, self.job.product.phase)
        self._split()

    def _pixels(self, product: Product, phase: Phase) -> None:
        """Rows of a phase as rows of the whole image."""
        w, (height, width) = window_of(product), phase.size
        stride = strides_of(product)
        y = f"m % {height * width} // {width} * {stride[0]} + {phase.at[0]}"
        x = f"m % {width} * {stride[1]} + {phase.at[1]}"
        self.body += [f"m = m // {height * width} * {w.size[0] * w.size[1]} + ({y}) * {w.size[1]} + {x}"]

    @property
    def wide(self) -> str:
        """What makes an index of tasks one of 64 bits, where there is need."""
        sizes = [sum((n - 1) * s for n, s in zip(o.shape, o.strides, strict=True)) for o in self._all()]
        return ".to(tl.int64)" if max(sizes, default=0) >= WIDE_INDEX else ""

    def _all(self) -> list[Operand]:
        near = self.job.needs | self.job.makes
        return [o for table in (self.operands, self.stored) for plane, o in table.items() if plane in near]

    def _split(self) -> None:
        """Names for the task, sample and row of the tile's rows: t, n, r."""
        if len(self.space.shape) != 4 or self.job.pool is not None:
            self.body += ["t = task"]
            return
        _, n, r, _ = self.space.shape
        task, row = (f"(m // {n * r}){self.wide}", f"(m % {n * r})") if self.space.merged else ("task", "m")
        self.body += [
            f"t = {task}",
            f"n = {row} // {r}" if r > 1 else f"n = {row}",
            f"r = {row} % {r}" if r > 1 else "r = 0",
        ]

    # --- addresses ----------------------------------------------------------------------------------------------------

    def address(self, operand: Operand, indices: Sequence[str]) -> str:
        """name + the indices by their strides; a dimension of 1 is met by all."""
        terms = [
            index if stride == 1 else f"{index} * {stride}"
            for index, size, stride in zip(indices, operand.shape, operand.strides, strict=True)
            if size > 1 and stride != 0
        ]
        return " + ".join([operand.name, *terms])

    def _at_tile(self, plane: int, row: int) -> str:
        """A plane read at the tile, broadcast; of a parameter of a norm its `row`. Read once."""
        if (plane, row) not in self.names:
            operand = self.operands[plane]
            name = f"a{len(self.names)}"
            self.names[plane, row] = name
            address = self.address(operand, self._indices(operand, row))
            self.body += [f"{name} = tl.load({self._spread(address)}, mask=live, other=0.0).to({self.type})"]
        return self.names[plane, row]

    def _spread(self, address: str) -> str:
        """A pointer for every element of the tile, whatever it depends on."""
        return f"{address} + (m * 0 + c * 0)"

    def _indices(self, operand: Operand, row: int) -> list[str]:
        """Of each dimension of an operand, aligned from the right to the space."""
        shape, ndim = self.space.shape, len(operand.shape)
        if len(shape) == 3 and ndim == 4:  # a gradient in pieces
            return ["t", "piece", "m", "c"]
        if row >= 0:  # [T, rows, F] of a norm, of which one row is read
            return ["t", str(row), "c"]
        if ndim == 1 and operand.shape[0] > 1:
            return ["t"]
        own = ["t", "n", "r", "c"] if len(shape) == 4 else ["t", "m", "c"]
        found = own[len(own) - ndim :]
        if ndim and 1 < operand.shape[-1] < shape[-1]:  # of a group of features
            found[-1] = f"c // {shape[-1] // operand.shape[-1]}"
        return found

    # --- products -----------------------------------------------------------------------------------------------------

    def _product(self, product: Product) -> None:
        tile, depth = self.tile, product.depth
        self.body += [f"acc = tl.zeros([{tile.rows}, {tile.cols}], {self.type})"]
        for term in product.terms:
            span, first = self._along(depth)
            self.body += [f"for k0 in range(0, {span}, {tile.depth}):"]
            inner = [f"k = {first} + tl.arange(0, {tile.depth})"]
            for name, reading, is_left in (("left", term.left, True), ("right", term.right, False)):
                k, other = ("k[None, :]", "m") if is_left else ("k[:, None]", "c")
                rows, cols = (other, k) if is_left else (k, other)
                bound = "live_m" if is_left else "live_c"
                inner += self._read(name, reading, rows, cols, f"{bound} & ({k} < {depth})", product)
            cast = self._cast(product, term)
            options = f"input_precision={self.precision!r}, out_dtype={self.type}"
            inner += [f"acc = tl.dot(left{cast}, right{cast}, acc, {options})"]
            self.body += [f"    {line}" for line in inner]
        if product.bias is not None:
            bias = self.operands[product.bias]
            address = self.address(bias, ["t", "m", "c"])
            self.body += [f"acc += tl.load({self._spread(address)}, mask=live, other=0.0).to({self.type})"]

    @property
    def _pieces(self) -> int:
        """Of the depth, a program each."""
        return 1 if self.job.of_shares else self.job.pieces

    def _along(self, depth: int) -> tuple[int, str]:
        """How far a program goes along the depth, and where its block at k0 starts."""
        span = depth_of_piece(depth, self._pieces, self.tile.depth)
        return span, "k0" if self._pieces == 1 else f"piece * {span} + k0"

    def _cast(self, product: Product, term: Term) -> str:
        half = product.half and not self.interpreted
        return f".to(tl.{self.operands[term.left.plane].dtype})" if half else f".to({self.type})"

    def _read(self, name: str, reading: Reading, rows: str, cols: str, mask: str, product: Product) -> list[str]:
        """A block of an operand by rows and columns of the block."""
        operand = self.operands[reading.plane]
        if reading.turned:
            rows, cols = cols, rows
        lines: list[str] = []
        if reading.way == "weight":
            address = self.address(operand, ["task", rows, cols])
        elif reading.way == "value":
            address = self._value(operand, rows, cols)
        else:
            lines, address, extra = WAYS[reading.way](self, operand, rows, cols, product)
            mask += f" & {extra}" if extra else ""
        whole = rows in address and cols in address  # else it is one row, column or number for all
        return [
            *lines,
            f"{name} = tl.load({address}{'' if whole else f' + ({rows} * 0 + {cols} * 0)'}, mask={mask}, other=0.0)",
        ]

    def _value(self, operand: Operand, rows: str, cols: str) -> str:
        """Rows are (n, r) of the operand itself; in merged rows (t, n, r)."""
        _, n, r, _ = operand.shape
        task = "task"
        if self.space.merged:
            task, rows = f"({rows} // {n * r}){self.wide}", f"({rows} % {n * r})"
        sample, row = (rows, "0") if r == 1 else (f"({rows} // {r})", f"({rows} % {r})")
        return self.address(operand, [task, sample, row, cols])

    def _sum(self) -> None:
        """acc [1, C] = the sum over rows of values, which may be several planes."""
        tile = self.tile
        self.body += [f"acc = tl.zeros([{tile.rows}, {tile.cols}], {self.type})"]
        for plane in self.job.summed:
            operand = self.operands[plane]
            depth = operand.shape[1] * operand.shape[2]
            address = self._value(operand, "k", "c")
            span, first = self._along(depth)
            self.body += [
                f"part = tl.zeros([{tile.depth}, {tile.cols}], {self.type})",
                f"for k0 in range(0, {span}, {tile.depth}):",
                f"    k = {first} + tl.arange(0, {tile.depth})[:, None]",
                f"    seen = (k < {depth}) & live_c",
                f"    part += tl.load({address} + (k * 0 + c * 0), mask=seen, other=0.0).to({self.type})",
                "acc += tl.sum(part, 0)[None, :]",
            ]

    def _weighed_sum(self, part: Part) -> None:
        """acc [1, 1] = sum_n c_n l_n, or the mean or sum of l_n where there is no c."""
        (each, c), depth = [self.operands.get(plane) for plane in part.reads], self.tile.depth
        assert each is not None
        samples = each.shape[1]
        loads = [
            f"tl.load({self.address(operand, ['task', 'k'])} + k * 0, mask=k < {samples}, other=0.0).to({self.type})"
            for operand in (each, c)
            if operand is not None
        ]
        self.body += [
            f"part = tl.zeros([{depth}, 1], {self.type})",
            f"for k0 in range(0, {samples}, {depth}):",
            f"    k = k0 + tl.arange(0, {depth})[:, None]",
            f"    part += {' * '.join(loads)}",
            "acc = tl.sum(part, 0)[None, :]",
        ]
        if c is None and not part.constants.total:
            self.body += [f"acc = acc / {samples}"]

    def _sum_of_shares(self) -> None:
        """acc = shares at the tile, added up block by block of them, and then the places in a block."""
        shares, pieces, block = self.operands[self.job.summed[0]], self.job.pieces, self.tile.depth
        over_tasks = shares.shape[0] != self.space.shape[0]
        count = shares.shape[0] * pieces if over_tasks else pieces
        if pieces > 1:
            address = self.address(
                shares, [f"(k // {pieces})", f"(k % {pieces})", "m", "c"] if over_tasks else ["t", "k", "m", "c"]
            )
        else:
            address = self.address(shares, ["k", *self._indices(shares, -1)[1:]])
        self.body += [
            f"each = tl.zeros([{block}, {self.tile.rows}, {self.tile.cols}], {self.type})",
            f"for k0 in range(0, {count}, {block}):",
            f"    k = (k0 + tl.arange(0, {block})[:, None, None]){self.wide}",
            f"    seen = live[None, :, :] & (k < {count})",
            f"    each += tl.load({self._spread(address)}, mask=seen, other=0.0).to({self.type})",
            "acc = tl.sum(each, 0)",
        ]

    # --- pointwise parts and stores -----------------------------------------------------------------------------------

    def _parts(self, held: dict[int, str]) -> None:
        if self.job.first is not None:
            self._store(self.job.first, "acc")
        for part in self.job.parts:
            for plane, expression in zip(part.writes, self._results(part, held), strict=True):
                if plane >= 0 and expression is not None:
                    # Numbered by place, not by plane: the same call of another step is the same text.
                    held[plane] = name = f"v{len(held)}"
                    self.body += [f"{name} = {expression}"]
                    self._store(plane, name)

    def _results(self, part: Part, held: Mapping[int, str]) -> Sequence[str | None]:
        if part.kernel in POOLS:
            lines, names = gathered(part, [self.operands.get(plane) for plane in part.reads], self.type)
            self.body += lines
            return names[: len(part.writes)]
        if isinstance(part.constants, Loss):
            z, zt = part.reads[0], part.reads[1] if part.kernel == "loss.tangent" else ABSENT
            logits = str(self._operand(z, held, -1)), self._operand(zt, held, -1)
            lines, results = judged(part, *logits, self.operands, self.space.shape, self.tile, self.type)
            self.body += lines
            return results
        row = part.constants.row if isinstance(part.constants, Normalisation) else -1
        return EXPRESSIONS[part.kernel](part, *[self._operand(plane, held, row) for plane in part.reads])

    def _panes(self, pool: Part, panes: Panes) -> None:
        """Window by window: all parts of one point after the other, and then what is made of its points."""
        index = self.operands.get(pool.reads[1]) if pool.kernel == "pool.tangent" else None
        before = before_panes(pool, panes, index, (self.tile.rows, self.tile.cols), self.type)
        outside, self.body = self.body, pane_lines(panes)
        held: dict[int, str] = {}
        self._parts(held)
        inner = [*self.body, *in_pane(pool, held[pool.reads[0]])]
        lines, names = after_panes(pool)
        points = f"for tap in range(0, {panes.kernel[0] * panes.kernel[1]}):"
        self.body = [*outside, *before, points, *(f"    {line}" for line in inner), *lines]
        for plane, name in zip(pool.writes, names, strict=True):
            self._store(plane, name)

    def _operand(self, plane: int, held: Mapping[int, str], row: int) -> str | None:
        if plane < 0:
            return None
        if plane in held:
            return held[plane]
        shape = self.operands[plane].shape
        return self._at_tile(plane, row if len(shape) == 3 and len(self.space.shape) == 4 else -1)

    def _store(self, plane: int, name: str) -> None:
        operand = self.stored.get(plane)
        if operand is not None and len(operand.shape) == 2:  # of a sample [T, N]
            address = " + ".join([operand.name, f"t * {operand.strides[0]}", "n", "m * 0"])
            self.body += [f"tl.store({address}, {name}, mask=live_m)"]
        elif operand is not None:
            address = self.address(operand, self._indices(operand, -1))
            self.body += [f"tl.store({self._spread(address)}, {name}, mask=live)"]
