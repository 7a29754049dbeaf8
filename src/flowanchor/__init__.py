"""flowanchor: few-step generators, trained as flow-anchored consistency models (FACM, arXiv 2507.03738)."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout, `flowanchor.plugins` and `flowanchor.conf` are the folders plugins/ and conf/ beside src/: they come
# from the same tree as this file, whatever version is installed. In a wheel they lie inside the package.
_root = _Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "plugins").is_dir() and (_root / "conf").is_dir():
    __path__.append(str(_root))
