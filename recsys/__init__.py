"""Training stack for recommenders that learn from long, variable-length user histories.

Importing this package checks that `kernels` and `data` are this project's: other distributions claim the same names.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

__version__ = "0.1.0"


def _check_sibling(name: str, root: Path) -> None:
    """Raise `ImportError` unless `import name` would find the package beside this one."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # already imported, by something that left it no spec
        spec = None
    places = [] if spec is None else [Path(place).resolve() for place in spec.submodule_search_locations or []]
    if spec is not None and not places and spec.origin is not None:
        places = [Path(spec.origin).resolve()]  # a module, not a package
    if root / name in places[:1]:
        return
    found = f"finds {places[0]}" if places else "finds nothing"
    raise ImportError(
        f"recsys needs its own package '{name}' in {root}, but `import {name}` {found}. "
        f"Put the project first: run from {root}, set PYTHONPATH={root}, or uninstall the other '{name}'."
    )


for _name in ("kernels", "data"):
    _check_sibling(_name, Path(__file__).resolve().parent.parent)
