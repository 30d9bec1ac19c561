"""Makes the folders beside this file importable as `bitdgdm.<folder>` from a bare checkout.

Guarantees: `import bitdgdm.infra` and the other floors work with this folder on `sys.path`, without an
installation and on a machine without GPU, CUDA or PyCUDA; `python bitdgdm.py` is the command line.
Knows nothing of: what the folders hold. An installed distribution maps the same folders by package-dir.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]

if __name__ == "__main__":
    import sys

    sys.modules["bitdgdm"] = sys.modules["__main__"]
    from bitdgdm.pipelines.cli import main

    main()
