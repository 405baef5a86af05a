# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Of Sphinx, for the tutorials and the API reference: ``make docs``."""

import pyro_hollow

project = "pyro_hollow"
author = "Contributors to the pyro_hollow project"
copyright = author
version = release = pyro_hollow.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {version}"
exclude_patterns = ["**.ipynb_checkpoints"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"  # `make tutorials` executes them
