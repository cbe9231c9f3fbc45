"""Sphinx: `sphinx-build -W docs site` makes the site of these pages and of the docstrings.

Three pages are files of the root (PAGES), one is made by `reference`, those of modules by apidoc.
Links to files of the repository, as they are on a disk, lead to those files' pages.
"""

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

project, version = "hybridlm", version_of("hybridlm")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.apidoc"]
smartquotes = False
html_theme = "furo"
html_title = f"hybridlm {version}"
html_static_path, html_css_files = ["_static"], ["site.css"]
exclude_patterns = ["conf.py", "reference.py", "api/*/modules.rst"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "ref.python"]  # a page may open at level 3; every kind has a Config

PACKAGES = ("hybridlm", "pallas_kernels", "eval", "launch", "configs")
PAGES = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
apidoc_modules = [
    {
        "path": f"../{package}",
        "destination": f"api/{package}",
        "separate_modules": True,
        "module_first": True,
        "exclude_patterns": ["**/hopper*", "**/hopper/**"],  # need a newer jax; kernels.md is about them
    }
    for package in PACKAGES
]
autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
autodoc_typehints = "signature"
autodoc_mock_imports = ["lm_eval", "submitit", "datasets"]  # of extras


def setup(app: Any) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", verbatim)


def read(app: Any, page: str, source: list[str]) -> None:
    """The text of a page: of the stubs here, what they stand for."""
    if page == "reference":
        import reference

        source[0] = reference.page()
    if page in PAGES:
        source[0] = rewritten((ROOT / PAGES[page]).read_text(), ROOT, page) + "\n" + source[0]
    elif not page.startswith("api/"):
        source[0] = rewritten(source[0], (DOCS / page).parent, page)


def rewritten(markdown: str, folder: Path, page: str) -> str:
    """``markdown`` of a file in ``folder`` with links that Sphinx finds from ``page``."""

    def lead(link: re.Match[str]) -> str:
        path, mark, anchor = link[2].partition("#")
        where = (folder / path).resolve()
        if not path or ":" in path or not where.exists():
            return link[0]  # -W ends the build with one that leads nowhere
        return f"{link[1]}(/{place(where.relative_to(ROOT))}{mark}{anchor})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", lead, markdown)


def place(path: Path) -> str:
    """The file in docs/ that is the page of ``path``, relative to the repository."""
    pages = {of: f"{page}.md" for page, of in PAGES.items()}
    if path.parts[0] in PACKAGES:
        parts = [part for part in path.with_suffix("").parts if part != "__init__"]
        return f"api/{parts[0]}/{'.'.join(parts)}.rst"
    return pages.get(str(path)) or str(path.relative_to("docs"))


def verbatim(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A docstring is plain text with code in backticks: its lines stay as they are."""

    def escaped(line: str) -> str:
        parts = re.split(r"(``?[^`]+``?)", line)
        text = lambda part: re.sub(r"([\\*_|`])", r"\\\1", part)
        code = lambda part: rf"\ ``{part.strip('` ')}``\ "  # the backslashes end it in the middle of a word
        return "".join(code(part) if i % 2 else text(part) for i, part in enumerate(parts))

    lines[:] = [f"| {escaped(line)}" if line.strip() else "" for line in lines]
