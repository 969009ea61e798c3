"""Counting the bytes of tensors that are alive at once, on any device, also without a device's own statistics."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Inside the block, `peak` is the most bytes that tensors made in it held at once. Operators' own scratch memory
    (of a matrix product, of fused attention) is not seen."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note((args, kwargs), counts=False)
        out = func(*args, **(kwargs or {}))
        self._note(out, counts=True)
        for key, (reference, _) in list(self._live.items()):
            if reference.expired():
                del self._live[key]
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out

    def _note(self, tensors, counts):
        """What comes in from outside of the block (weights, inputs) is known, but not counted."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._live:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() if counts else 0)
