"""Convolution around the panel kernel: NCHW in and out, taps gathered in L1 per pixel panel.

The image is copied once into a padded one, split by the phases of the stride, so that any tap of
any run of output pixels in a row is one contiguous run. A panel of output pixels is then a short
list of vector copies per (channel, tap); a copy may run past its row, the next one mends it. 1x1
convolutions of stride 1 without padding read the image itself.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class ConvIO:
    """X [n][ic][ih][iw] in, Y [n][oc][oh][ow] out; a panel holds output pixels of one image."""

    def __init__(
        self, geometry: Conv2dGeometry, epilogue: Epilogue, lanes: int, kb: int, threads: int
    ) -> None:
        self.whole, self.epilogue = geometry, epilogue
        self.vectors, self.kb, self.threads = Vectors(lanes), kb, threads
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

    def prepare(self, image: Any) -> None:
        """Copy the image into its padded form, a channel a step."""
        if not self.padded.needed:
            return
        self.source = B.alloc_buffer((self.padded.size,), "float32", scope="global")
        loop = B.parallel if self.threads > 1 else B.serial
        with loop(0, self.geometry.in_channels) as channel:
            self.padded.emit_channel(self.x, self.source, image, channel)

    def begin_unit(self, row_range: tuple[Any, Any], first: Any, nt: int) -> None:
        """List what packing copies."""
        self.panel = PackedPanel(self.vectors, self.kb, nt)
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
        plane = (image * self.geometry.in_channels + block * self.kb) * pixels

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

        A run's last copy may pass the row's end; the next run's first copy mends that, since it
        comes later. The list is the same for every (channel, tap), so that its loop is foreseen.
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
        B.buffer_store(self.copies, T.int32(0), [0])
        B.buffer_store(pixel, T.Cast("int32", first), [0])
        last = T.Cast("int32", T.min(first + width, g.pixels))
        with B.While(pixel[0] < last):
            at = self.copies[0]
            row = T.floordiv(pixel[0], g.out_width)
            B.buffer_store(self.source_at, row * (p.row_stride - g.out_width) + pixel[0], [at])
            B.buffer_store(self.target_at, pixel[0] - T.Cast("int32", first), [at])
            B.buffer_store(self.copies, at + 1, [0])
            step = T.min(pixel[0] + v.lanes, (row + 1) * g.out_width)
            B.buffer_store(pixel, step, [0])

    def _pack_taps(self, panel: Any, nt: int, block: Any) -> None:
        g, v, p = self.geometry, self.vectors, self.padded
        taps = g.kernel[0] * g.kernel[1]
        with B.serial(0, self._block_length(block)) as k:
            row = block * self.kb + k
            base = p.tap_offset(T.floordiv(row, taps), T.floormod(row, taps))
            with B.serial(0, self.copies[0]) as copy:
                value = v.load(self.source, base + self.source_at[copy])
                v.store(panel, value, k * (nt * v.lanes) + self.target_at[copy])

    def sums(self, size: int, first: Any) -> tuple[Any, Any]:
        """Reserve a buffer of their own: results go straight to the image."""
        return B.alloc_buffer((size,), "float32", scope="global"), 0

    def store_rows(self, tile: RegisterTile, rows: Sequence[Any], image: Any, first: Any) -> None:
        """Apply the epilogue and store each row's run of pixels, masked at the end of the image."""
        g = self.geometry
        if is_long(self.epilogue):
            scratch = B.alloc_buffer((tile.mr * tile.width,), "float32", scope="global")
            order = B.alloc_buffer((tile.mr,), "int32", scope="global")
            tile.write(scratch, lambda r: r * tile.width)
            for r, row in enumerate(rows):
                B.buffer_store(order, row, [r])
            with B.serial(0, tile.mr) as r:
                row = order[r]
                with B.If(row < g.out_channels), B.Then():
                    self._store_run(tile.width, row, image, first, scratch, r * tile.width)
            return
        for r, row in enumerate(rows):
            if g.out_channels % tile.mr:
                with B.If(row < g.out_channels), B.Then():
                    self._store_run(tile.width, row, image, first, tile.acc[r], None)
            else:
                self._store_run(tile.width, row, image, first, tile.acc[r], None)

    def _store_run(
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
        # Whole vectors, so that clearing one channel never reaches into the next, which another
        # thread may own.
        self.plane = -(-self.rows * self.width // lanes) * lanes
        # Copies overrun the last row by less than a vector.
        self.size = g.in_channels * self.phases * self.plane + lanes

    @property
    def row_stride(self) -> int:
        """Distance between output rows."""
        return self.geometry.strides[0] * self.width

    def tap_offset(self, channel: Any, tap: Any) -> Any:
        """Offset of a (channel, tap) from that of the first output pixel."""
        g = self.geometry
        y = T.floordiv(tap, g.kernel[1]) * g.dilation[0]
        x = T.floormod(tap, g.kernel[1]) * g.dilation[1]
        phase = T.floormod(x, self.phases)
        return (
            (channel * self.phases + phase) * self.plane
            + y * self.width
            + T.floordiv(x, self.phases)
        )

    def emit_channel(self, x: Any, target: Any, image: Any, channel: Any) -> None:
        """Copy one channel: zeros where the padding is, the image elsewhere."""
        g, v = self.geometry, self.vectors
        top, left = g.padding[0], g.padding[1]
        source = (image * g.in_channels + channel) * g.in_height * g.in_width
        base = channel * self.phases * self.plane
        with B.serial(0, self.phases * self.plane // v.lanes) as i:
            v.store(target, v.zero(), base + i * v.lanes)
        with B.serial(0, min(g.in_height, self.rows - top)) as row:
            for phase in range(self.phases):
                # Image columns c with (c + left) mod phases == phase, that the padded width still
                # holds.
                start = (phase - left) % self.phases
                count = max(0, -(-(g.in_width - start) // self.phases))
                first = (start + left) // self.phases
                count = min(count, self.width - first)
                if count <= 0:
                    continue
                at = base + phase * self.plane + (row + top) * self.width + first
                self._copy_run(x, source + row * g.in_width + start, target, at, count)

    def _copy_run(self, x: Any, source: Any, target: Any, at: Any, count: int) -> None:
        """Copy `count` elements, every phases-th of x."""
        v = self.vectors
        whole = count // v.lanes
        if self.phases == 1:
            with B.serial(0, whole) as i:
                v.store(target, v.load(x, source + i * v.lanes), at + i * v.lanes)
        elif self.phases == 2:
            # The second load may not pass the run's end, so the last vector is left to the scalar
            # loop.
            whole = max(0, (2 * count - 1) // (2 * v.lanes))
            evens = [2 * k for k in range(v.lanes)]
            with B.serial(0, whole) as i:
                low = v.load(x, source + 2 * i * v.lanes)
                high = v.load(x, source + (2 * i + 1) * v.lanes)
                v.store(target, tirx.Shuffle([low, high], evens), at + i * v.lanes)
        else:
            whole = 0
        with B.serial(whole * v.lanes, count) as i:
            B.buffer_store(target, x[source + i * self.phases], [at + i])
