"""What a CUDA graph does, without CUDA: the operations of one call, and the memory they worked on, again and again."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

FROM_DEVICE = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal"}  # the host would wait for these


class Recorder(TorchDispatchMode):
    """Records operators; refuses those for which the host would have to know what the device computed."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in FROM_DEVICE:
            raise AssertionError(f"{func} needs the device's values on the host")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        """Run every operator again on the tensors it saw, into the memory it filled; what the host said still holds."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(function, *args):
    """Run a function, and return (its result, the recorder)."""
    with Recorder() as recorder:
        out = function(*args)
    return out, recorder
