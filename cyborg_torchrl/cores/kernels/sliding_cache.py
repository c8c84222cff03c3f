"""A cache of the last steps that acting extends without copying it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class SlidingCache:
    """Makes room for a step in a cache of the last W steps.

    The cache is a view into a longer buffer. A new step is written behind the view. The next cache is the view one step
    later. Earlier views keep their content, so a caller may store them. A buffer is copied once in W steps.

    A cache that is not the newest view of the buffer is copied into a new buffer. So it is right for any caller, and
    fast for one that continues from the last result.

    Args:
        dim: the dimension of the steps.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._buffer: Tensor | None = None
        self._end = 0

    def extend(self, cache: Tensor) -> Tensor:
        """Return the cache with room for one more step at its end, W + 1 in `dim`. The caller writes this step.

        Args:
            cache: the last W steps.
        """
        width = cache.shape[self.dim]
        if self._buffer is None or self._end == self._buffer.shape[self.dim] or not self._is_newest(cache):
            shape = list(cache.shape)
            shape[self.dim] = 2 * width
            self._buffer, self._end = cache.new_empty(shape), width
            self._buffer.narrow(self.dim, 0, width).copy_(cache)
        self._end += 1
        return self._buffer.narrow(self.dim, self._end - width - 1, width + 1)

    def _is_newest(self, cache: Tensor) -> bool:
        """Return whether a cache is the view that the last call made, without its oldest step."""
        assert self._buffer is not None
        view = self._buffer.narrow(self.dim, self._end - cache.shape[self.dim], cache.shape[self.dim])
        return (cache.data_ptr(), cache.shape, cache.stride(), cache.dtype) == (
            view.data_ptr(),
            view.shape,
            view.stride(),
            view.dtype,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SlidingCache:
        return SlidingCache(self.dim)

    def __reduce__(self) -> tuple[type[SlidingCache], tuple[int]]:
        return SlidingCache, (self.dim,)
