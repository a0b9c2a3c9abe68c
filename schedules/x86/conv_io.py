"""Convolution around the panel kernel: NCHW in and out, taps gathered in L1 per pixel panel.

The image is copied once into a padded one, split by the phases of the stride, so that any tap of
any run of output pixels in a row is one contiguous run. A panel of output pixels is then a short
list of vector copies per (channel, tap); a copy may run past its row, the next one mends it. 1x1
convolutions of stride 1 without padding read the image itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...workload import Conv2dGeometry, Epilogue
from ..epilogue import emit_epilogue, is_long
from ..vectors import Vectors
from .matmul_io import argument, flat
from .packed_panel import PackedPanel
from .register_tile import RegisterTile
from .tile_store import each_row


class ConvIO:
    """X [n][ic][ih][iw] in, Y [n][oc][oh][ow] out; a panel holds output pixels of one image."""

    def __init__(
        self, geometry: Conv2dGeometry, epilogue: Epilogue, lanes: int, mr: int, kb: int
    ) -> None:
        self.whole, self.epilogue = geometry, epilogue
        self.vectors, self.mr, self.kb = Vectors(lanes), mr, kb
        self.batch = tirx.Var("n", "int64") if geometry.batch is None else geometry.batch
        # In NCHW the channels of a group lie side by side, so a group of an image is an image of
        # its own.
        self.geometry = replace(
            geometry,
            in_channels=geometry.in_channels // geometry.groups,
            out_channels=geometry.out_channels // geometry.groups,
            groups=1,
        )
        self.padded = PaddedImage(self.geometry, lanes)

    def plane(self, image: Any, channel: Any) -> Any:
        """Tell which plane of x holds a channel of an image."""
        return image * self.geometry.in_channels + channel

    def declare_input(self) -> None:
        """Declare x."""
        g = self.whole
        self.x = argument("x", (self.batch, g.in_channels, g.in_height, g.in_width))

    def declare_output(self) -> None:
        """Declare the epilogue's vectors [oc] and tensors (the shape of y), and y."""
        g = self.whole
        shape = (self.batch, g.out_channels, g.out_height, g.out_width)
        self.channels = [
            B.arg(f"channel{i}", B.Buffer((g.out_channels,), "float32"))
            for i in range(self.epilogue.channels)
        ]
        self.tensors = [argument(f"tensor{i}", shape) for i in range(self.epilogue.tensors)]
        self.y = argument("y", shape)

    def open_views(self) -> None:
        """Alias x, the tensors and y as flat buffers."""
        self.x, self.y = flat(self.x), flat(self.y)
        self.tensors = [flat(tensor) for tensor in self.tensors]

    def columns(self) -> Any:
        """Count the output pixels of an image."""
        return self.geometry.pixels

    def images(self) -> Any:
        """Run once an image and group."""
        return self.batch * self.whole.groups

    def group(self, image: Any) -> Any:
        """Name the group: groups follow each other within an image."""
        return T.floormod(image, self.whole.groups) if self.whole.groups > 1 else 0

    def prepare(self, image: Any, thread: Any, shares: Sequence[tuple[int, int]]) -> None:
        """Copy the rows of the image that a thread's panels will read into their padded form."""
        if not self.padded.needed:
            return
        self.source = B.alloc_buffer((self.padded.size,), "float32", scope="global")
        for index, share in enumerate(shares):
            band = self.padded.band(*share)
            if len(shares) == 1:
                self._pad_band(image, band)
            elif band[0] < band[1]:
                with B.If(thread == index), B.Then():
                    self._pad_band(image, band)

    def _pad_band(self, image: Any, band: tuple[int, int]) -> None:
        self.padded.emit_band(self.x, self.source, lambda c: self.plane(image, c), band)

    def begin_unit(self, row_range: tuple[Any, Any], first: Any, nt: int) -> None:
        """List what packing copies, and reserve what a long epilogue needs."""
        self.panel = PackedPanel(self.vectors, self.kb, nt)
        if is_long(self.epilogue):
            size = self.mr * nt * self.vectors.lanes
            self.scratch = B.alloc_buffer((size,), "float32", scope="global")
            self.order = B.alloc_buffer((self.mr,), "int32", scope="global")
        if self.padded.needed:
            self._list_copies(first, nt)

    def block_of(self, image: Any, first: Any, nt: int, block: Any) -> tuple[Any, Any]:
        """Gather [kb][pixels] for the block's (channel, tap) rows."""
        if self.padded.needed:
            self._pack_taps(self.panel.buffer, nt, block)
        else:
            self._pack_runs(self.panel.buffer, image, first, nt, block)
        self.panel.close()
        return self.panel.buffer, 0

    def _block_length(self, block: Any) -> Any:
        depth = self.geometry.weight_shape[1]
        if depth <= self.kb:
            return depth
        return T.min(T.int32(self.kb), depth - block * self.kb) if depth % self.kb else self.kb

    def _pack_runs(self, panel: Any, image: Any, first: Any, nt: int, block: Any) -> None:
        v, pixels = self.vectors, self.geometry.pixels
        width = nt * v.lanes
        plane = self.plane(image, block * self.kb) * pixels

        def copy(masked: bool) -> None:
            with B.serial(0, self._block_length(block)) as k:
                for j in range(nt):
                    at = plane + k * pixels + first + j * v.lanes
                    left = T.Cast("int32", pixels - first - j * v.lanes)
                    value = v.load_masked(self.x, at, left) if masked else v.load(self.x, at)
                    v.store(panel, value, k * width + j * v.lanes)

        self._whole_or_masked(first, width, copy)

    def _whole_or_masked(self, first: Any, width: int, emit: Any) -> None:
        """Emit both forms behind a branch, or only the one that can occur."""
        pixels = self.geometry.pixels
        if pixels % width == 0:
            emit(False)
        elif pixels < width:
            emit(True)
        else:
            with B.If(first + width <= pixels):
                with B.Then():
                    emit(False)
                with B.Else():
                    emit(True)

    def _list_copies(self, first: Any, nt: int) -> None:
        """List the vector copies that fill a panel: for each row of pixels it crosses, a run.

        A run ends with a copy that ends where it ends; only a run shorter than a vector is passed
        by its copy. The list is the same for every (channel, tap).
        """
        g, v, p = self.geometry, self.vectors, self.padded
        width = nt * v.lanes
        crossed = (width - 2) // g.out_width + 2
        longest = nt + crossed
        self.source_at = B.alloc_buffer((longest,), "int32", scope="global")
        self.target_at = B.alloc_buffer((longest,), "int32", scope="global")
        self.copies = B.alloc_buffer((1,), "int32", scope="global")
        # TVM shrinks a buffer to the indices that it can foresee: written whole, it stays whole.
        with B.serial(0, longest) as i:
            B.buffer_store(self.source_at, T.int32(0), [i])
            B.buffer_store(self.target_at, T.int32(0), [i])
        pixel = B.alloc_buffer((1,), "int32", scope="global")
        start = T.Cast("int32", first)
        B.buffer_store(self.copies, T.int32(0), [0])
        B.buffer_store(pixel, start, [0])
        last = T.Cast("int32", T.min(first + width, g.pixels))
        with B.While(pixel[0] < last):
            at = self.copies[0]
            row = T.floordiv(pixel[0], g.out_width)
            run_start = T.max(start, row * g.out_width)
            run_end = T.min(last, (row + 1) * g.out_width)
            copied = T.min(pixel[0], T.max(run_start, run_end - v.lanes))
            B.buffer_store(self.source_at, row * (p.row_stride - g.out_width) + copied, [at])
            B.buffer_store(self.target_at, copied - start, [at])
            B.buffer_store(self.copies, at + 1, [0])
            B.buffer_store(pixel, T.min(copied + v.lanes, run_end), [0])

    def _pack_taps(self, panel: Any, nt: int, block: Any) -> None:
        """Copy every tap of a block's channels; a block of columns is whole channels.

        Where runs are no shorter than a vector, but for a panel's first and last, all taps of a
        channel go through the list together. Its last copy then comes first: what it writes behind
        the panel's row is the start of the next tap's, which the others write after it. Else tap
        follows tap, and the next one mends what a copy passes.
        """
        g, v, p = self.geometry, self.vectors, self.padded
        rows, columns = g.kernel
        width = nt * v.lanes
        together = nt > 1 and g.out_width >= v.lanes
        with B.serial(0, T.floordiv(self._block_length(block), rows * columns)) as channel:
            source = p.channel_offset(block * (self.kb // (rows * columns)) + channel)
            target = channel * (rows * columns * width)

            def copy_taps(copy: Any, taps: Sequence[tuple[int, int]]) -> None:
                """Copy some taps, at constant distances from each other."""
                from_, to = source + self.source_at[copy], target + self.target_at[copy]
                for y, x in taps:
                    value = v.load(self.source, from_ + p.tap_offset(y, x))
                    v.store(panel, value, to + (y * columns + x) * width)

            taps = [(y, x) for y in range(rows) for x in range(columns)]
            if together:
                with B.serial(0, self.copies[0]) as i:
                    copy_taps(T.if_then_else(i == 0, self.copies[0] - 1, i - 1), taps)
            else:
                for tap in taps:
                    with B.serial(0, self.copies[0]) as i:
                        copy_taps(i, [tap])

    def sums(self, rows: int, width: int, first: Any) -> tuple[Any, Any]:
        """Reserve a buffer of their own: results go straight to the image."""
        return B.alloc_buffer((rows * width,), "float32", scope="global"), 0

    def store_rows(self, tile: RegisterTile, rows: Sequence[Any], image: Any, first: Any) -> None:
        """Apply the epilogue and store each row's run of pixels, masked at the end of the image."""
        channels = self.geometry.out_channels
        if not is_long(self.epilogue):

            def store_row(row: Any, registers: Sequence[Any]) -> None:
                self.store_run(tile.width, row, image, first, registers, None)

            each_row(tile, rows, channels, store_row)
            return
        # Its code stands in a loop over the rows, once and not for each of them.
        tile.write(self.scratch, lambda r: r * tile.width)
        for r, row in enumerate(rows):
            B.buffer_store(self.order, row, [r])
        with B.serial(0, tile.mr) as r, B.If(self.order[r] < channels), B.Then():
            self.store_run(tile.width, self.order[r], image, first, self.scratch, r * tile.width)

    def store_run(
        self, width: int, row: Any, image: Any, first: Any, values: Any, offset: Any
    ) -> None:
        """Store one row of the tile: from its registers, or from `values` at a given `offset`."""
        g, v = self.geometry, self.vectors
        base = (image * g.out_channels + row) * g.pixels + first
        channel = self.group(image) * g.out_channels + row

        def emit_vector(j: Any, acc: Any, masked: bool) -> None:
            at = base + j * v.lanes
            left = T.Cast("int32", g.pixels - first - j * v.lanes)

            def load(index: int) -> Any:
                tensor = self.tensors[index]
                return v.keep(v.load_masked(tensor, at, left) if masked else v.load(tensor, at))

            result = emit_epilogue(
                self.epilogue,
                acc,
                lambda index: v.keep(v.splat(self.channels[index][channel])),
                load,
                v.lanes,
            )
            if masked:
                v.store_masked(self.y, result, at, left)
            else:
                v.store(self.y, result, at)

        def emit(masked: bool) -> None:
            if offset is None:
                for j, register in enumerate(values):
                    emit_vector(j, v.load(register), masked)
            else:
                with B.serial(0, width // v.lanes) as j:
                    emit_vector(j, v.keep(v.load(values, offset + j * v.lanes)), masked)

        self._whole_or_masked(first, width, emit)

    def end_unit(self, image: Any, first: Any, nt: int, row_range: tuple[Any, Any]) -> None:
        """Everything was stored."""


class PaddedImage:
    """The image with its padding, one plane per channel and phase of the horizontal stride.

    Padded row y and column x of channel c lie in plane (c, x mod stride) at [y][x div stride].
    """

    def __init__(self, geometry: Conv2dGeometry, lanes: int) -> None:
        g = geometry
        self.geometry, self.vectors = g, Vectors(lanes)
        self.needed = g.kernel != (1, 1) or g.strides != (1, 1) or any(g.padding)
        self.phases = g.strides[1]
        self.rows = (g.out_height - 1) * g.strides[0] + (g.kernel[0] - 1) * g.dilation[0] + 1
        reach = (g.out_width - 1) * g.strides[1] + (g.kernel[1] - 1) * g.dilation[1] + 1
        self.width = -(-reach // self.phases)
        self.plane = -(-self.rows * self.width // lanes) * lanes
        # Copies overrun the last row by less than a vector.
        self.size = g.in_channels * self.phases * self.plane + lanes

    @property
    def row_stride(self) -> int:
        """Distance between output rows."""
        return self.geometry.strides[0] * self.width

    def channel_offset(self, channel: Any) -> Any:
        """Offset of a channel's first plane."""
        return channel * (self.phases * self.plane)

    def tap_offset(self, y: Any, x: int) -> Any:
        """Offset of tap (y, x) from the first one's, in the same channel."""
        g = self.geometry
        phase, column = x * g.dilation[1] % self.phases, x * g.dilation[1] // self.phases
        return phase * self.plane + y * g.dilation[0] * self.width + column

    def band(self, first: int, end: int) -> tuple[int, int]:
        """Tell which padded rows output pixels [first, end) are computed from."""
        g = self.geometry
        last = min(end, g.pixels) - 1
        if last < first:
            return 0, 0
        low = first // g.out_width * g.strides[0]
        return low, last // g.out_width * g.strides[0] + (g.kernel[0] - 1) * g.dilation[0] + 1

    def emit_band(
        self, x: Any, target: Any, plane_of: Callable[[Any], Any], band: tuple[int, int]
    ) -> None:
        """Copy a range of padded rows: zeros where the padding is, the image elsewhere.

        `plane_of` tells which plane of x holds a channel.
        """
        g = self.geometry
        low, high = band
        top = g.padding[0]
        first, last = max(low - top, 0), min(high - top, g.in_height)
        with B.serial(0, g.in_channels) as channel:
            base = self.channel_offset(channel)
            for phase in range(self.phases):
                plane = base + phase * self.plane
                self._clear(target, plane + low * self.width, (high - low) * self.width)
            if first < last:
                source = plane_of(channel) * (g.in_height * g.in_width)
                with B.serial(first, last) as row:
                    self._copy_row(x, source + row * g.in_width, target, base, row + top)

    def _clear(self, target: Any, at: Any, count: int) -> None:
        v, whole, rest = self._cover(count)
        with B.serial(0, whole) as i:
            v.store(target, v.zero(), at + i * v.lanes)
        if rest:
            v.store(target, v.zero(), at + (count - v.lanes))

    def _cover(self, count: int) -> tuple[Vectors, int, int]:
        """Cover `count` elements: a vector width, whole vectors, and what is left behind them.

        One more vector that ends where they end covers the rest. A run shorter than a vector takes
        narrower ones.
        """
        v = Vectors(min(self.vectors.lanes, 1 << (count.bit_length() - 1)))
        return v, *divmod(count, v.lanes)

    def _copy_row(self, x: Any, source: Any, target: Any, base: Any, row: Any) -> None:
        """Copy one row of the image, split by phases, to a padded row."""
        g = self.geometry
        for phase in range(self.phases):
            # Image columns c with (c + left) mod phases == phase, that the padded width still
            # holds.
            left = g.padding[1]
            start = (phase - left) % self.phases
            first = (start + left) // self.phases
            count = min(-(-(g.in_width - start) // self.phases), self.width - first)
            if count > 0:
                at = base + phase * self.plane + row * self.width + first
                self._copy_run(x, source + start, target, at, count)

    def _copy_run(self, x: Any, source: Any, target: Any, at: Any, count: int) -> None:
        """Copy `count` elements, every phases-th of x."""
        if self.phases > 2:
            with B.serial(0, count) as i:
                B.buffer_store(target, x[source + i * self.phases], [at + i])
            return
        v, whole, rest = self._cover(count)

        def copy(first: Any, is_last: bool) -> None:
            value = self._load_every(v, x, source + first * self.phases, is_last)
            v.store(target, value, at + first)

        # The vector that ends the run must not read behind it, where the image may end.
        steps = whole if rest else whole - 1
        with B.serial(0, steps) as i:
            copy(i * v.lanes, False)
        copy(count - v.lanes, True)

    def _load_every(self, v: Vectors, x: Any, source: Any, is_last: bool) -> Any:
        """Load elements `phases` apart; `is_last` reads nothing behind the last of them."""
        if self.phases == 1 or v.lanes == 1:
            return v.load(x, source)
        evens, back = [2 * k for k in range(v.lanes)], 0
        if is_last:
            # Half of them are then the odd ones of a vector that begins one earlier.
            back = 1
            evens = [k if k < v.lanes else k + 1 for k in evens]
        pair = [v.load(x, source), v.load(x, source + v.lanes - back)]
        return tirx.Shuffle(pair, evens)
