"""What a head's outputs are called: in a Hugging Face config.json, and in that of a run of ours."""

from pathlib import Path
from typing import Any

from pkm_jax.data.files import read_json
from pkm_jax.models.bert import BertConfig

# Of a classification: `data.problem` of a run, `problem_type` elsewhere.
PROBLEMS = {'single_label': 'single_label_classification',
            'multi_label': 'multi_label_classification', 'regression': 'regression'}
WINDOW = 384        # tokens of the windows that questions are answered in
LEAST_PADDED = 32   # tokens, more than the answers that are looked at


def described(config: BertConfig, run: dict[str, Any]) -> dict[str, Any]:
    """The part of a Hugging Face config.json that names the outputs of a classifier with `config`;
    `run` is the config.json of the run that trained it, {} where there is none."""
    if not {'classifier', 'token_classifier'} & set(config.output_heads):
        return {}
    data = run.get('data', {})
    names = list(data.get('labels', ())) or [f'LABEL_{i}' for i in range(config.classes)]
    named: dict[str, Any] = {'id2label': {str(i): name for i, name in enumerate(names)},
             'label2id': {name: i for i, name in enumerate(names)}}
    if 'classifier' in config.output_heads:
        problem = data.get('problem', 'regression' if config.classes == 1 else 'single_label')
        named['problem_type'] = PROBLEMS[problem]
    return named


def of_run(folder: Path, config: BertConfig) -> dict[str, Any]:
    """The sections `task` and `data` that a run has where the model in a Hugging Face folder was
    fine-tuned; {} where it was not."""
    heads, path = config.output_heads, folder / 'config.json'
    found = read_json(path) if path.exists() else {}
    if 'span' in heads:
        return {'task': 'question_answering', 'data': {
            'length': min(WINDOW, config.max_length),
            'buckets': [min(LEAST_PADDED, config.max_length)]}}
    if not {'classifier', 'token_classifier'} & set(heads):
        return {}
    data = {'length': config.max_length, 'labels': _names(found, config.classes)}
    if 'token_classifier' in heads:
        return {'task': 'token_classification', 'data': data}
    problems = {theirs: ours for ours, theirs in PROBLEMS.items()}
    usual = 'regression' if config.classes == 1 else 'single_label'
    problem = problems.get(found.get('problem_type'), usual)
    if problem == 'regression':
        data['labels'] = []
    return {'task': 'classification', 'data': {
        **data, 'problem': problem, 'text_pair': 'text_pair'}}


def _names(found: dict[str, Any], classes: int) -> list[str]:
    """The names of the classes, as transformers makes them up where there are none."""
    named = found.get('id2label')
    named = named if isinstance(named, dict) else {}
    return [str(named.get(str(i), f'LABEL_{i}')) for i in range(classes)]
