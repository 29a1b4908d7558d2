"""Settings of the site, which `make docs` builds from the pages beside this file, by Sphinx."""

import ast
import inspect
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from flax import nnx
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']

project = 'pkm_jax'
author = 'The pkm_jax authors'
project_copyright = 'The pkm_jax authors, Apache-2.0'
release = version = PROJECT['version']

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton']
myst_heading_anchors = 4        # as GitHub names them
highlight_language = 'text'     # of indented blocks
copybutton_exclude = '.linenos, .gp, .go'

default_role = 'code'           # docstrings name things in single backticks
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_typehints_format = 'short'
maximum_signature_line_length = 88
napoleon_numpy_docstring = False

html_theme = 'furo'
html_title = f'pkm_jax {version}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    'light_css_variables': {'color-brand-primary': '#0757ba', 'color-brand-content': '#0757ba'},
    'dark_css_variables': {'color-brand-primary': '#79b8ff', 'color-brand-content': '#79b8ff'}}


def _signature(_: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None,
               result: str | None) -> tuple[str | None, str | None]:
    """Signatures as they are written: a module's is that of its __init__, an array is an Array."""
    if what == 'class' and issubclass(thing, nnx.Module):
        given = inspect.signature(thing.__init__)
        own = given.replace(parameters=list(given.parameters.values())[1:],
                            return_annotation=inspect.Signature.empty)
        signature = stringify_signature(own, unqualified_typehints=True).replace(
            "<class 'jax.numpy.float32'>", 'jnp.float32')
    return signature, result


def _short_names(_: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """An array is an Array, wherever its class is defined."""
    if 'body' in context:
        context['body'] = context['body'].replace('jaxlib._jax.', '')


class HelpOf(SphinxDirective):
    """The docstring of a program, by its path: what its --help begins with."""
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = ROOT / self.arguments[0]
        self.env.note_dependency(path)
        said = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
        return [nodes.literal_block(said, said, language='text')]


class ThemedImages(SphinxTransform):
    """Beside each NAME-light.svg stands NAME-dark.svg: the theme shows one of them."""
    default_priority = 400

    def apply(self, **_: Any) -> None:
        for image in list(self.document.findall(nodes.image)):
            if image['uri'].endswith('-light.svg'):
                dark = image.deepcopy()
                dark['uri'] = image['uri'].replace('-light.', '-dark.')
                image.parent.replace_self([
                    nodes.container('', image, classes=['drawing', 'only-light']),
                    nodes.container('', dark, classes=['drawing', 'only-dark'])])


def setup(app: Sphinx) -> None:
    app.add_directive('help-of', HelpOf)
    app.add_transform(ThemedImages)
    app.connect('autodoc-process-signature', _signature)
    app.connect('html-page-context', _short_names)
