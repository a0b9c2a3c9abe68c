"""TVM's pool of memory, which grows with every size that it meets.

Its allocator keeps what a call gives back, by exact size, for the next call that wants the same. A
model with symbolic sizes wants others at each of them, and nothing is ever returned: after every
length from 1 to 512 there would be some 256 times the memory of the longest.
"""

from __future__ import annotations

# So many combinations of sizes are kept at most; a server batches into fewer.
KEPT_SIZES = 64

_met: set[tuple[int, ...]] = set()


def bound_memory(sizes: tuple[int, ...]) -> None:
    """Give unused memory back to the system when a call's sizes are one combination too many.

    Parameters
    ----------
    sizes : tuple of int
        The values of a model's symbolic sizes, in the order of its inputs; empty where it has none.
    """
    if sizes in _met:
        return
    if len(_met) >= KEPT_SIZES:
        import tvm_ffi

        # What calls that are running use stays theirs.
        tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")()
        _met.clear()
    _met.add(sizes)
