"""Files that come with the package: the tiny pair's configuration, prompts and traits.

They lie in the repository's root; an installed package has them in `lda_files` (pyproject.toml).
"""

from pathlib import Path

from jobs.errors import Refused

_SITE = Path(__file__).resolve().parents[1]
_FILES = _SITE / "lda_files" if (_SITE / "lda_files").is_dir() else _SITE
_PATTERNS = ("serve_config*.yaml", "prompts/**/*.txt", "traits/tiny/*")


def shipped(name: str) -> Path:
    """Where `name`, as it is called in the repository, lies here. Raises Refused."""
    for folder in (_FILES, _SITE):  # organisms is a package, wherever the others are
        if (folder / name).exists():
            return folder / name
    raise Refused(f"{name} does not come with the package; `lda files` shows what does")


def names() -> list[str]:
    found = {path for pattern in _PATTERNS for path in _FILES.glob(pattern)}
    return sorted(path.relative_to(_FILES).as_posix() for path in found)
