"""Which packages of the hosts are installed, and whether one of them is not what it is taken for.

Nothing is imported for it: a package is looked for as Python would, and read as files. So a broken
one cannot break the report, and importing megatron-core (seconds) is not waited for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

from ssdtrain_plugin.doctor.findings import Finding, unknown

__all__ = ["apex_finding", "megatron_finding"]

_OLDEST_TESTED = (0, 16)
_NEEDS_TRITON = (0, 18)
_VERSION_LINE = re.compile(r"^(MAJOR|MINOR|PATCH)\s*=\s*(\d+)", re.MULTILINE)
_APEX_PARTS = ("normalization", "optimizers")
_APEX_EXTENSIONS = ("fused_layer_norm_cuda", "amp_C")


def _find(name: str) -> ModuleSpec | None:
    """Find a module, or a module of a package, without importing either."""
    path: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        present = ".".join(parts[:depth])
        spec = next((found for finder in sys.meta_path if (found := finder.find_spec(present, path))), None)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _folder(spec: ModuleSpec) -> Path | None:
    return next((Path(location) for location in spec.submodule_search_locations or ()), None)


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def megatron_finding() -> Finding:
    """Tell which megatron-core a training would get, and what it needs beside."""
    name = "Megatron"
    core = _find("megatron.core")
    folder = None if core is None else _folder(core)
    if folder is None:
        return Finding(name, "megatron-core is not installed; only training with Megatron needs it")
    try:
        text = (folder / "package_info.py").read_text(encoding="utf-8")
    except OSError as error:
        return unknown(name, f"`{folder}` has no readable package_info.py: {error.strerror}")
    numbers = {key: int(value) for key, value in _VERSION_LINE.findall(text)}
    version = numbers.get("MAJOR", 0), numbers.get("MINOR", 0), numbers.get("PATCH", 0)
    facts = [f"megatron-core {'.'.join(map(str, version))}"]
    if _find("megatron.training") is None:
        facts.append("no megatron.training (a checkout of Megatron-LM on PYTHONPATH has it; own loops need none)")
    else:
        facts.append("megatron.training")
    has_triton = _find("triton") is not None
    facts.append("triton" if has_triton else "no triton")
    advices = []
    if version < _OLDEST_TESTED:
        advices.append("this release is older than any that the plugin was tested with; take 0.16.1 or newer")
    if version >= _NEEDS_TRITON and not has_triton:
        advices.append("from 0.18 on `import megatron.core` fails without triton; `pip install triton`")
    return Finding(name, ", ".join(facts), "; ".join(advices) or None)


def apex_finding() -> Finding:
    """Tell whether NVIDIA apex is installed, or something else of that name.

    Neither Megatron nor DeepSpeed needs apex. But Megatron takes any module of that name for it.
    """
    name = "NVIDIA apex"
    spec = _find("apex")
    if spec is None:
        return Finding(name, "not installed; Megatron and DeepSpeed do without it")
    missing = [f"apex.{part}" for part in _APEX_PARTS if _find(f"apex.{part}") is None]
    if missing:
        return _impostor(name, spec, missing)
    version = _installed_version("apex")
    fact = f"{version or 'from source'}; Megatron takes its layer norm (`--transformer-impl local`) and optimizers"
    unbuilt = [extension for extension in _APEX_EXTENSIONS if _find(extension) is None]
    if not unbuilt:
        return Finding(name, fact)
    advice = (
        f"it was built without {' and '.join(unbuilt)}; Megatron takes it all the same and fails in the first step; "
        "build it with its CUDA extensions, or `pip uninstall apex`"
    )
    return Finding(name, fact, advice)


def _impostor(name: str, spec: ModuleSpec, missing: Sequence[str]) -> Finding:
    """Warn of another module that is called apex; on the Python Package Index there is one."""
    place = _folder(spec) or Path(spec.origin or "apex")
    version = _installed_version("apex")
    way_out = f"take `{place.parent}` off the Python path" if version is None else "`pip uninstall apex`"
    advice = (
        "Megatron takes it for NVIDIA's, and with `--transformer-impl local` no model can be built: "
        f'"Apex must be installed to use FusedLayerNorm."; DeepSpeed ignores it; {way_out}'
    )
    named = f"apex {version}" if version else "the module apex"
    return Finding(name, f"{named} in `{place.parent}` is something else: it has no {' and no '.join(missing)}", advice)
