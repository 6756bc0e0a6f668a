"""Twilight for SGLang: adaptive top-p attention sparsity for long-context decoding.

Installed, `twilight_sgl.kernels` and `twilight_sgl.patches` are ordinary subpackages. In a source
tree they are the top-level folders beside this one, found through this package's search path.
"""

from pathlib import Path

__version__ = "0.1.0"

_source_root = Path(__file__).resolve().parent.parent
if (_source_root / "kernels" / "seal").is_dir() and (_source_root / "patches").is_dir():
    __path__.append(str(_source_root))
