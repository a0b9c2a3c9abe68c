"""How Sphinx builds these pages: ``make docs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import tvm_sparse

project = "tvm_sparse"
release = version = tvm_sparse.__version__
copyright = "the authors of tvm_sparse, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "scripts_as_pages",
    "pages_left_over",
]
exclude_patterns = ["_ext", "_static"]
html_theme = "furo"
html_title = f"tvm_sparse {release}"

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
# Pages are also read where they lie: what they link to beside themselves are files of the project.
myst_all_links_external = False

napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
scripts_as_pages = {"tutorials": "../tutorials"}
