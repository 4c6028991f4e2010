"""The site of this folder: ``sphinx-build -W docs site``. Every warning is an error.

Sphinx with furo: every page is Markdown that GitHub shows as it is (MyST), the reference is read
off the docstrings of the package that is installed, and both are kept well; mkdocs-material, the
other choice, ends in May 2027.
"""

from __future__ import annotations

from quantization.version import VERSION

project = "quantization"
release = version = VERSION
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_*"]
html_theme = "furo"
html_title = "quantization"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#00796b", "color-brand-content": "#00695c"},
    "dark_css_variables": {"color-brand-primary": "#4db6ac", "color-brand-content": "#80cbc4"},
}
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # they stand in the signature
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # the members below say the types
