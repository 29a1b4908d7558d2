"""The page of all fields."""

from pathlib import Path

from pkm_jax.configuration.command_line import _fields
from pkm_jax.configuration.reference import reference
from pkm_jax.configuration.resolve import defaults


def test_the_page_is_as_the_code_says():
    page = Path(__file__).parents[2] / 'docs/configuration.md'
    assert page.read_text() == reference(), (
        'write it anew: python -m pkm_jax.configuration.reference > docs/configuration.md')


def test_every_field_of_a_configuration_is_on_it():
    sections = {'model', 'memory', 'memory.shards', 'data', 'train', 'log', 'distributed',
                'model.family', 'ablation'}
    for model, task in (('bert', 'masked_lm'), ('causal', 'causal_lm')):
        fields = set(_fields(defaults(model, task))) - sections
        assert fields and not [field for field in fields if f'| `{field}` |' not in reference()]
