"""Configuration of Sphinx, which builds the pages of this folder as a site: `make docs`."""

import ncsr_fast

project = "ncsr_fast"
author = "The ncsr_fast authors"
release = ncsr_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"ncsr_fast {release}"
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
# single backquotes in docstrings are code
default_role = "code"
# PyTorch's own pages are not fetched: the build needs no network
nitpicky = False
