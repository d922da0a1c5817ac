"""What answers depend on, written down with them: weights, methods, versions, machine."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import platform
from pathlib import Path
from typing import Any

from kvlib.recipe import Recipe


def digest(*parts: bytes) -> str:
    """A short hash."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:12]


def fingerprint(model: Any) -> str:
    """A hash of a model's weights (the first 256 values of each), to tell models of one name apart."""
    parts = []
    for name, parameter in model.named_parameters():
        parts += [name.encode(), parameter.detach().flatten()[:256].float().cpu().numpy().tobytes()]
    return digest(*parts)


def source_of(recipe: Recipe) -> str:
    """A hash of the code of a recipe's methods and of the files that they name, such as head tables."""
    parts = []
    for method in (recipe.heads, recipe.evict, recipe.select):
        if method is None:
            continue
        parts.append(_code_of(type(method)))
        values = [getattr(method, field.name) for field in dataclasses.fields(method)]
        parts += [Path(value).read_bytes() for value in values if isinstance(value, str) and Path(value).is_file()]
    return digest(*parts)


def _code_of(cls: type) -> bytes:
    try:
        return inspect.getsource(cls).encode()
    except (OSError, TypeError):  # written at a prompt: there is no file to read
        functions = [value.__code__ for value in vars(cls).values() if inspect.isfunction(value)]
        return repr([(code.co_name, code.co_code, code.co_names, code.co_consts) for code in functions]).encode()


def this_run(model: Any) -> dict[str, Any]:
    """Versions and machine."""
    import torch
    import transformers

    from kvlib._version import __version__

    machine = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x.split(":", 1)[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        machine = names[0] if names else machine
    return {
        "kvlib": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "machine": f"{machine}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }
