"""Runs a masked posterior scan as `_masked_plan` cuts it up, with tangents and without."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality.kernels.stored import StoredProblem
from pyflocality.kernels.triton import _masked_products as products
from pyflocality.kernels.triton import _masked_softmax as kernels
from pyflocality.kernels.triton._cached import Cached
from pyflocality.kernels.triton._centred_images import CentredImages
from pyflocality.kernels.triton._launch import on_device_of
from pyflocality.kernels.triton._masked_levels import OUTPUTS, MaskLevels, unpacked
from pyflocality.kernels.triton._masked_plan import Config, ScanSizes, plan_scan
from pyflocality.kernels.triton._merge import empty_state, merge_partials
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState
from pyflocality.posterior.tangents import centre_of
from pyflocality.storage.reader import BYTES_PER_UNIT, bytes_to_values, values_to_bytes

# Elements of weights in float64 at a time.
_ELEMENTS_AT_A_TIME = 2**22


def centred_noisy(problem: PosteriorProblem, centre: Tensor) -> Tensor:
    """Noisy images minus alpha times the centre of the images, float64 [B, D]."""
    noisy = problem.x.detach().double().flatten(1)
    return noisy - problem.alpha[:, None] * bytes_to_values(centre.double())


def sums_over_weights(levels: MaskLevels, values: Tensor) -> Tensor:
    """Weighted sums of every row of values [R, D] for each query: float64 [R, Q]."""
    values, step = values.double(), max(1, _ELEMENTS_AT_A_TIME // values.shape[1])
    sums = []
    for rows in levels.weights.split(step):
        if rows.dtype == torch.uint8:
            rows = unpacked(rows, values.shape[1])
        sums.append(values @ rows.double().T)
    return torch.cat(sums, 1)


def value_columns(values: Tensor, first: int, last: int) -> Tensor:
    """Value images [N, R, C, H, W] of some columns of the images, [R, D, last - first].

    They lie as the copy of the images does; columns past the last image are zero.
    """
    count, dim = values.shape[1], values[0, 0].numel()
    result = torch.empty(count, dim, last - first, device=values.device)
    step = max(1, _ELEMENTS_AT_A_TIME // (count * dim))
    some = values[first:last]
    # A view whose images lie apart is copied a few images at a time.
    for start in range(0, len(some), step):
        block = some[start : start + step].flatten(2)
        result[..., start : start + len(block)] = block.permute(1, 2, 0)
    result[..., len(some) :] = 0.0
    return result


class MaskedScan:
    """One scan of all images for some noisy images at one precision.

    Args:
        stored: The noisy images [n, C, H, W].
        images: The images, centred.
        levels: The products that the weights need.
        config: Shapes of the kernels.
        halves: float16 halves that queries are kept in.
        tangents: Further queries of each noisy image, float64 [n, T, D]; 1 + T divides the
            queries of a program. None is none.
    """

    def __init__(
        self,
        stored: StoredProblem,
        images: CentredImages,
        levels: MaskLevels,
        config: Config,
        halves: int,
        tangents: Tensor | None = None,
    ) -> None:
        problem = stored.problem
        self.images, self.levels, self.config, self.halves = images, levels, config, halves
        self.budget = memory_budget_bytes(problem.memory_budget)
        self.chunk_size = problem.chunk_size
        self.values, self.has_image = problem.values, problem.answers_image
        # Weighted sums of an output of a noisy image.
        self.sums = problem.answered
        queries = centred_noisy(problem, images.centre)[:, None]
        if tangents is not None:
            queries = torch.cat([queries, tangents], 1)
        self.count, self.slots = queries.shape[:2]
        self.group_images = config.batch // self.slots
        self.groups = triton.cdiv(self.count, self.group_images)
        self.places = levels.levels[0].tiles * OUTPUTS
        # A power of two that brings the largest value near 2^14: half precision then resolves
        # 2^-38 of it, and weights up to 2 and sums stay in range.
        exponent = 14 - torch.frexp(queries.abs().amax(2)).exponent
        self.unit = torch.ldexp(torch.ones_like(queries[..., 0]), exponent)
        self.queries = self.grouped(queries * self.unit[..., None], 0.0).flatten(1, 2)
        self.gain = self.grouped(255.0 / (problem.alpha * self.unit[:, 0]), 0.0)
        self.factor = self.grouped(stored.factor, 1.0)

    def grouped(self, values: Tensor, fill: float) -> Tensor:
        """What belongs to noisy images [n, ...] by group, filled up: float32 [G, images, ...]."""
        grouped = values.new_full((self.groups * self.group_images, *values.shape[1:]), fill)
        grouped[: len(values)] = values
        return grouped.float().unflatten(0, (self.groups, self.group_images))

    @property
    def sizes(self) -> ScanSizes:
        """What the scan's memory depends on."""
        return ScanSizes(
            config=self.config,
            groups=self.groups,
            group_images=self.group_images,
            halves=self.halves,
            sums=self.sums,
            places=self.places,
            places_above=sum(level.tiles * OUTPUTS for level in self.levels.levels[1:]),
            blocks=sum(level.blocks for level in self.levels.levels),
            dim=self.images.dim,
            columns=self.images.columns,
            held_bytes=self.levels.nbytes + self.queries.nbytes,
            value_bytes=0 if self.values is None else self.values[0].nbytes,
            chunk_size=self.chunk_size,
        )

    def run(self) -> PosteriorState:
        """The scan, in units of the centred bytes.

        Returns:
            Smallest distances without their common term and weights, float32 [n, Q]; weighted
            sums, [n, Q, sums].
        """
        has_copy = self.images.cached_whole is not None
        plan = plan_scan(self.sizes, self.budget, has_copy=has_copy)
        whole = self.images.whole() if plan.copied else None
        with on_device_of(self.queries):
            norms = self._cached_norms(plan.norm_width)
            states = [
                state
                for group_slices in plan.turns
                for state in self._states(group_slices, plan.width, whole, norms)
            ]
        return self._by_output(states)

    def _cached_norms(self, width: int | None) -> Tensor | None:
        """Squared norms of all images over all masks, cached for the next call with these masks."""
        owner, cached = self.images.norms.get("masked", (None, None))
        if width is None or owner is not self.levels:
            # Before others are made: both may not fit.
            self.images.norms.pop("masked", None)
            owner = cached = None
        if width is None:
            return None
        if cached is None:
            norms = torch.empty(self.places, self.images.columns, device=self.queries.device)
            whole = self.images.whole()
            for first in range(0, self.images.columns, width):
                target = norms[:, first : first + width]
                self._norms(whole[:, first : first + width], first, target)
            cached = Cached(norms)
            self.images.norms["masked"] = (self.levels, cached)
        return cached.here()[0]

    def _norms(self, columns: Tensor, first: int, target: Tensor | None = None) -> Tensor:
        """Squared norms of the images from `first` on over all masks."""
        count = len(self.images.images) - first
        return products.squared_norms(columns, count, self.levels, self.config, target)

    def _states(
        self,
        group_slices: tuple[slice, ...],
        width: int,
        whole: Tensor | None,
        norms: Tensor | None,
    ) -> list[PosteriorState]:
        """States of some groups, after one walk through the images in slices of a width."""
        per_group = self.places * self.group_images
        states = [
            empty_state((some.stop - some.start) * per_group, self.sums, self.gain.device)
            for some in group_slices
        ]
        packed = self._packed(group_slices[0]) if len(group_slices) == 1 else None
        for first in range(0, self.images.columns, width):
            last = min(first + width, self.images.columns)
            self._take_slice(slice(first, last), group_slices, states, packed, whole, norms)
        return states

    def _take_slice(
        self,
        chosen: slice,
        group_slices: tuple[slice, ...],
        states: list[PosteriorState],
        packed: list[Tensor] | None,
        whole: Tensor | None,
        norms: Tensor | None,
    ) -> None:
        """Take a slice of the images into the states; what is made for it ends with the call."""
        first, last = chosen.start, chosen.stop
        columns = self.images.columns_of(first, last) if whole is None else whole[:, chosen]
        norms = self._norms(columns, first) if norms is None else norms[:, chosen]
        values = None if self.values is None else value_columns(self.values, first, last)
        for index, some in enumerate(group_slices):
            # Without a name here, the queries of one slice are gone before those of the next.
            states[index] = self._scan(
                columns, norms, values, packed or self._packed(some), some, states[index]
            )

    def _packed(self, some: slice) -> list[Tensor]:
        return products.pack_queries(self.queries[some], self.levels, self.config, self.halves)

    def _scan(
        self,
        columns: Tensor,
        norms: Tensor,
        values: Tensor | None,
        packed: list[Tensor],
        some: slice,
        state: PosteriorState,
    ) -> PosteriorState:
        """Take some columns of the images into the state of some groups."""
        config, level = self.config, self.levels.levels[0]
        cores = products.core_sums(columns, packed, self.levels, config, self.halves)
        blocks = columns.shape[1] // config.block_n
        partials = self.weigh(
            (level.tiles, len(packed[0]), triton.cdiv(blocks, config.split_blocks)),
            some,
            values,
            images_ptr=columns,
            queries_ptr=packed[0],
            cores_ptr=self.gain if cores is None else cores,
            norms_ptr=norms,
            outputs_ptr=self.levels.outputs,
            row_scale_ptr=level.row_scale,
            gain_ptr=self.gain[some],
            factor_ptr=self.factor[some],
            blocks=level.blocks,
            places_above=0 if cores is None else cores.shape[1],
            column_blocks=blocks,
            split_blocks=config.split_blocks,
            stride_image=columns.stride(0),
            stride_norm=norms.stride(0),
            stride_sum=columns.shape[1],
            HALVES=self.halves,
            **products.list_arguments(level, config, config.scan),
        )
        per_row = self.factor[some][:, None].expand(-1, self.places, -1)
        return merge_partials(state, partials, per_row.reshape(-1).contiguous())

    def weigh(
        self,
        grid: tuple[int, int, int],
        some: slice,
        values: Tensor | None,
        **arguments: object,
    ) -> PosteriorState:
        """Run the scan's kernel for some groups: the states of all splits.

        Values are those of the columns, as `value_columns` answers them, or None.
        """
        shape = (grid[2], grid[1] * self.places * self.group_images)
        minimum, total = (torch.empty(shape, device=self.gain.device) for _ in range(2))
        weighted = torch.empty(*shape, self.sums, device=self.gain.device)
        kernels.masked_scan_kernel[grid](
            minimum_ptr=minimum,
            total_ptr=total,
            weighted_ptr=weighted,
            values_ptr=self.gain if values is None else values,
            stride_value=0 if values is None else values.stride(1),
            dim=self.images.dim,
            VALUES=self.sums - self.has_image,
            HAS_IMAGE=self.has_image,
            SLOTS=triton.next_power_of_2(max(1, self.sums - self.has_image)),
            BATCH=self.config.batch,
            **arguments,
        )
        return PosteriorState(minimum, total, weighted)

    def _by_output(self, states: list[PosteriorState]) -> PosteriorState:
        """The states of all groups by noisy image and output, [n, Q] and [n, Q, sums]."""
        at, result = self.levels.levels[0].places, []
        for sums in zip(*states, strict=True):
            groups = [
                some.reshape(-1, self.places, self.group_images, *some.shape[1:]) for some in sums
            ]
            result.append(torch.cat(groups)[:, at].transpose(1, 2).flatten(0, 1)[: self.count])
        return PosteriorState(*result)


class TangentScan(MaskedScan):
    """The scan of all noisy images with a group of tangents.

    Args:
        stored: The noisy images [B, C, H, W].
        tangents: Directions, float64 [B, slots - 1, D].
        images: The images, centred.
        levels: The products that the weights need.
        config: Shapes of the kernels.
    """

    def __init__(
        self,
        stored: StoredProblem,
        tangents: Tensor,
        images: CentredImages,
        levels: MaskLevels,
        config: Config,
    ) -> None:
        # Two halves: a derivative is a difference that no noise makes forgiving.
        super().__init__(stored, images, levels, config, 2, tangents)
        self.sums = 2 * self.slots
        # In the units of the kernel: centred bytes, and products with scaled tangents.
        centre = values_to_bytes(centre_of(stored.problem).double().flatten(1))
        centre = centre - images.centre.double()
        places, row_scale = levels.outputs.long(), levels.levels[0].row_scale
        self._centre = self.grouped(centre[:, places], 0.0).transpose(1, 2).contiguous()
        inner = torch.cat([torch.zeros_like(tangents[:, :1]), tangents], 1) * centre[:, None]
        offsets = sums_over_weights(levels, inner.flatten(0, 1)).unflatten(0, self.unit.shape)
        offsets = offsets[..., levels.queries] * self.unit[..., None] / row_scale
        self._offset = self.grouped(offsets, 0.0).permute(0, 3, 1, 2).contiguous()

    def weigh(
        self,
        grid: tuple[int, int, int],
        some: slice,
        values: Tensor | None,
        **arguments: object,
    ) -> PosteriorState:
        """Run the scan's kernel for some groups, without values: the states of all splits."""
        shape = (grid[2], grid[1] * self.places * self.group_images)
        minimum = torch.empty(shape, device=self.gain.device)
        sums = torch.empty(*shape, self.sums, device=self.gain.device)
        kernels.masked_jvp_kernel[grid](
            centre_ptr=self._centre[some],
            offset_ptr=self._offset[some],
            minimum_ptr=minimum,
            sums_ptr=sums,
            IMAGES=self.group_images,
            SLOTS=self.slots,
            **arguments,
        )
        return PosteriorState(minimum, sums[..., 0].contiguous(), sums)

    def sums_of(self, tangents: int) -> tuple[Tensor, ...]:
        """The scan in units of values, for the first of the tangents, float64.

        Returns:
            Smallest distances in centred bytes and weights, [B, Q]; weighted sums of the values
            [B, Q, 1], of the products c and of c times the value, [B, Q, tangents].
        """
        minimum, total, sums = (tensor.double() for tensor in self.run())
        level = self.levels.levels[0]
        row_scale = level.row_scale.double()[level.places]
        unit = row_scale[:, None] / self.unit[:, None, 1 : 1 + tangents] / BYTES_PER_UNIT
        plain, weighted = sums.unflatten(-1, (2, self.slots)).unbind(-2)
        weighted = weighted / BYTES_PER_UNIT
        inner, cross = (own[..., 1 : 1 + tangents] * unit for own in (plain, weighted))
        return minimum, total, weighted[..., :1], inner, cross
