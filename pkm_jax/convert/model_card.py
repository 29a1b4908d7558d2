"""The README.md of an exported folder: what it is, what it was trained on, what loads it."""

from pathlib import Path
from typing import Any

LEAST_TRANSFORMERS = '4.40'     # which modeling_pkm_bert.py checks
TRIED = '4.40.2, 4.46.3, 4.53.3, 4.57.1 and 5.24.0'
# Fields of a run's section `data` that name texts, and what they are.
SOURCES = {'corpus': 'pretrained on', 'train': 'trained on', 'validation': 'chosen by'}


def model_card(content: dict[str, Any], run: dict[str, Any]) -> str:
    """Markdown for the folder whose `config.json` holds `content`; `run` is that of the run that
    trained it, {} where it is not known."""
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
    lines += ['```python', f'from transformers import {auto}, AutoTokenizer',
              f"model = {auto}.from_pretrained('FOLDER'{remote})",
              "tokenizer = AutoTokenizer.from_pretrained('FOLDER')", '```', '',
              *_training(content, run),
              'Written by [pkm_jax](https://arxiv.org/abs/2010.03881).']
    return '\n'.join(lines) + '\n'


def _training(content: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """A list of what was trained, on what, from what; nothing of a run that says none of it."""
    data, train = run.get('data', {}), run.get('train', {})
    facts = []
    if task := run.get('task'):
        facts.append(f'task: {task}' + (f' ({data["name"]})' if data.get('name') else ''))
    if source := run.get('init_from'):
        facts.append(f'started from: {Path(source).name}')
    facts += [f'{what}: {", ".join(Path(one).name for one in data[field].split(","))}'
              for field, what in SOURCES.items() if data.get(field)]
    if names := content.get('id2label'):
        facts.append(f'labels: {", ".join(names.values())}')
    if train:
        facts.append(f'at most {train["steps"]:,} steps of {train["batch"]:,} examples, '
                     f'learning rate {train["learning_rate"]:g}, seed {run.get("seed", 0)}')
    if not facts:
        return []
    return ['## Training', '', *(f'* {fact}' for fact in facts), '']
