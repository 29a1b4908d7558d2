"""The README.md of an exported folder: what it is, and what loads it."""

from typing import Any

LEAST_TRANSFORMERS = '4.40'     # which modeling_pkm_bert.py checks
TRIED = '4.40.2, 4.46.3, 4.53.3, 4.57.1 and 5.24.0'


def model_card(content: dict[str, Any]) -> str:
    """Markdown for the folder whose `config.json` holds `content`."""
    (architecture,) = content['architectures']
    name = architecture.removeprefix('Pkm').replace('Bert', 'AutoModel', 1)
    auto = 'AutoModel' if name == 'AutoModelModel' else name
    lines = ['---', 'library_name: transformers', '---', '', f'# {architecture}', '']
    if memory := content.get('memory'):
        slots = memory['sub_keys'] ** 2
        lines += [f'A BERT with product-key memories of {slots:,} slots in layers '
                  f'{memory["layers"]} (placement: {memory["placement"]}).', '',
                  f'Needs **transformers {LEAST_TRANSFORMERS} or later** (tried with {TRIED}) '
                  'and PyTorch. Its code, `modeling_pkm_bert.py`, travels along:', '']
    else:
        lines += ['An ordinary BERT for transformers.', '']
    remote = ', trust_remote_code=True' if memory else ''
    lines += ['```python', f'from transformers import {auto}',
              f"model = {auto}.from_pretrained('FOLDER'{remote})", '```', '',
              'Written by [pkm_jax](https://arxiv.org/abs/2010.03881).']
    return '\n'.join(lines) + '\n'
