"""The README.md of an exported folder, the card of its model (docs/model_card.md)."""

from pathlib import Path
from typing import Any

LEAST_TRANSFORMERS = '4.40'     # which modeling_pkm_bert.py checks
TRIED = '4.40.2, 4.46.3, 4.53.3, 4.57.1 and 5.24.0'
# Fields of a run's section `data` that name texts, and what they are.
SOURCES = {'corpus': 'pretrained on', 'train': 'trained on', 'validation': 'chosen by'}


# What the card cannot know, and its reader needs.
TO_ADD = (
    ('licence', 'of the weights, which is also a matter of what they were trained on and from'),
    ('data', 'where the text is from, its languages, what was filtered, what is personal in it'),
    ('use', 'what it is meant for, and what it must not be used for'),
    ('limits', 'where it was seen to fail; whose language or views it does not represent'),
    ('cost', 'hardware, hours, and energy where it is known'))
USAGE = 'slots', 'top_1_usage', 'ceiling', 'top_k_usage', 'kl'
PIPELINES = {'MaskedLM': 'fill-mask', 'SequenceClassification': 'text-classification',
             'QuestionAnswering': 'question-answering',
             'TokenClassification': 'token-classification'}


def model_card(content: dict[str, Any], run: dict[str, Any],
               evaluation: dict[str, Any] | None = None) -> str:
    """Markdown for the folder whose `config.json` holds `content`.

    `run` is the `config.json` of the run that trained it, {} where it is not known; `evaluation`
    the line of its `metrics.jsonl` with what these very weights reached.
    """
    (architecture,) = content['architectures']
    name = architecture.removeprefix('Pkm').replace('Bert', 'AutoModel', 1)
    auto = 'AutoModel' if name == 'AutoModelModel' else name
    pipeline = PIPELINES.get(auto.removeprefix('AutoModelFor'))
    lines = ['---', 'library_name: transformers',
             *([f'pipeline_tag: {pipeline}'] if pipeline else []), 'tags:', '- pkm_jax',
             *(['- product-key-memory'] if content.get('memory') else []), '---', '',
             f'# {architecture}', '']
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
              *_training(content, run), *_evaluation(evaluation or {}),
              '## Before you publish it', '', 'This card was written by a program, from the files '
              'of the run. Add what they do not say:', '',
              *(f'* **{what}**: {meaning}' for what, meaning in TO_ADD), '',
              'Written by pkm_jax, which implements '
              '[Kim and Jung (2020)](https://arxiv.org/abs/2010.03881).']
    return '\n'.join(lines) + '\n'


def _evaluation(record: dict[str, Any]) -> list[str]:
    """Tables of the metrics, and of how each memory is used; nothing without an evaluation."""
    numbers = {name: value for name, value in record.items()
               if isinstance(value, int | float) and name not in ('step', 'time', 'tokens')}
    if not numbers:
        return []
    lines = ['## Evaluation', '', f'By the run itself, on its validation data, at step '
             f'{record["step"]:,}:', '', '| metric | value |', '| --- | --- |',
             *(f'| {name} | {value:,.6g} |' for name, value in numbers.items()), '']
    of_layers = record.get('memory')
    memories = {layer: one for layer, one in
                (of_layers if isinstance(of_layers, dict) else {}).items()
                if isinstance(one, dict)
                and all(isinstance(one.get(name), int | float) for name in USAGE)}
    if memories:
        lines += [f'Memory usage over {record.get("eval_tokens", 0):,} tokens (it grows with '
                  'them):', '', '| layer | slots | top-1 usage | of at most | top-K usage | KL |',
                  '| --- | --- | --- | --- | --- | --- |']
        lines += [f'| {layer} | {one["slots"]:,} | {one["top_1_usage"]:.1%} | '
                  f'{one["ceiling"]:.1%} | {one["top_k_usage"]:.1%} | {one["kl"]:.2f} |'
                  for layer, one in memories.items()] + ['']
    return lines


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
