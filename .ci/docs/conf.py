"""Settings of Sphinx for the API reference; `build.py` runs it."""

import importlib.metadata
import re
from typing import Any

project = "flax_qformer"
release = importlib.metadata.version("flax-qformer")
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
# The docstrings put code between single backticks.
default_role = "code"
python_maximum_signature_line_length = 100

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "special-members": "__call__",
    "exclude-members": "dtype, param, param_dtype",
    "inherited-members": "Module, BaseException",
}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Signatures already show the types.
napoleon_attr_annotations = False

SHORTER = (
    # Flax adds these two arguments to each module.
    (r"(, )?parent: [^=]*= <flax[^>]*>, name: str \| None = None", ""),
    (r"<class 'jax\.numpy\.(\w+)'>", r"jnp.\1"),
    (r"str \| type\[[^]]*\] \| [\w.~]*dtype \| [\w.~]*SupportsDType", "DTypeLike"),
)
"""Patterns in signatures, and what to write instead."""


def shorten(*event: Any) -> tuple[str | None, str | None]:
    arguments, returned = event[-2:]
    for pattern, text in SHORTER:
        arguments = arguments and re.sub(pattern, text, arguments)
    return arguments, returned


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", shorten)
