"""What a parameter is called here, by Hugging Face and in the original TensorFlow BERT.

A path here is the module's place in the tree and the parameter's name: `layers/3/memory/values`.
"""

import re

LAYER = 'bert.encoder.layer.{}.'
MODULES = {
    'embeddings/word': 'bert.embeddings.word_embeddings',
    'embeddings/position': 'bert.embeddings.position_embeddings',
    'embeddings/segment': 'bert.embeddings.token_type_embeddings',
    'embeddings/norm': 'bert.embeddings.LayerNorm',
    'layers/*/attention/query': LAYER + 'attention.self.query',
    'layers/*/attention/key': LAYER + 'attention.self.key',
    'layers/*/attention/value': LAYER + 'attention.self.value',
    'layers/*/attention/output': LAYER + 'attention.output.dense',
    'layers/*/attention_norm': LAYER + 'attention.output.LayerNorm',
    'layers/*/feed_forward/up': LAYER + 'intermediate.dense',
    'layers/*/feed_forward/down': LAYER + 'output.dense',
    'layers/*/output_norm': LAYER + 'output.LayerNorm',
    'layers/*/memory': LAYER + 'memory',
    'layers/*/memory/query': LAYER + 'memory.query',
    'layers/*/memory/query_norm': LAYER + 'memory.query_norm',
    'layers/*/memory/output': LAYER + 'memory.output',
    'layers/*': LAYER[:-1],
    'pooler': 'bert.pooler.dense',
    'mlm': 'cls.predictions',
    'mlm/transform': 'cls.predictions.transform.dense',
    'mlm/norm': 'cls.predictions.transform.LayerNorm',
    'nsp': 'cls.seq_relationship',
    'classifier': 'classifier',
    'token_classifier': 'classifier',
    'span': 'qa_outputs',
}
LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'decoder': 'decoder.weight',
          'mean': 'running_mean', 'var': 'running_var'}

TENSORFLOW = {
    'mlm/bias': 'cls/predictions/output_bias',
    'nsp/kernel': 'cls/seq_relationship/output_weights',
    'nsp/bias': 'cls/seq_relationship/output_bias',
    'classifier/kernel': 'output_weights',
    'classifier/bias': 'output_bias',
    'span/kernel': 'cls/squad/output_weights',
    'span/bias': 'cls/squad/output_bias',
}


def is_kernel(path: str) -> bool:
    """Whether `path` is a matrix that multiplies from the right here, from the left in PyTorch."""
    return path.endswith('/kernel')


def huggingface(path: str) -> str:
    """The name in a state dict of transformers, with its `bert.` prefix; kernels are transposed."""
    module, leaf = path.rsplit('/', 1)
    layer = re.match(r'layers/(\d+)', module)
    name = MODULES[re.sub(r'layers/\d+', 'layers/*', module)]
    return f'{name.format(layer and layer[1])}.{LEAVES.get(leaf, leaf)}'


def tensorflow(path: str) -> str:
    """The name in a checkpoint of google-research/bert."""
    if path in TENSORFLOW:
        return TENSORFLOW[path]
    module, leaf = path.rsplit('/', 1)
    name = huggingface(path).rsplit('.', 1)[0].replace('.', '/').replace('layer/', 'layer_')
    leaf = {'scale': 'gamma', 'bias': 'beta'}[leaf] if module.endswith('norm') else leaf
    return name if leaf == 'embedding' else f'{name}/{leaf}'
