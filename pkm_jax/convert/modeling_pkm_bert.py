"""BERT with product-key memories for PyTorch and transformers: a file that needs nothing else.

It travels inside every exported folder that has a memory:

    AutoModel.from_pretrained(FOLDER, trust_remote_code=True)      # transformers 4.40 or later

Memories follow Lample et al. 2019, "Large Memory Layers with Product Keys". Batch norm of queries
always uses the running statistics, also in training mode: a block does not know which tokens are
padding, and padding must not enter them.
"""

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLayer,
    BertModel,
)

if tuple(map(int, transformers.__version__.split('.')[:2])) < (4, 40):
    raise ImportError(f'This model needs transformers 4.40 or later, not '
                      f'{transformers.__version__}: pip install -U transformers')


class PkmBertConfig(BertConfig):
    """A BERT configuration and `memory`: layers, placement and sizes of the memories."""
    model_type = 'pkm_bert'
    memory: dict | None = None


class QueryNorm(nn.Module):
    """Normalises each half of every head's query, [T, H, 2, Q/2]."""

    def __init__(self, kind: str, shape: tuple[int, int, int]):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        if kind == 'batch':
            self.register_buffer('running_mean', torch.zeros(shape))
            self.register_buffer('running_var', torch.ones(shape))

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        if self.kind == 'batch':
            mean, var = self.running_mean, self.running_var
        else:
            mean = query.mean(-1, keepdim=True)
            var = query.var(-1, keepdim=True, unbiased=False)
        return (query - mean) * torch.rsqrt(var + 1e-5) * self.weight + self.bias


class ProductKeyMemory(nn.Module):
    """Reads the sum of the `top_k` best of `sub_keys`² value rows for each of `heads` queries.

    A large table comes in several blocks of rows. A table that belongs to the memory of another
    layer is given as `shared` and is no parameter of this one.
    """

    def __init__(self, width: int, memory: dict, shared: nn.ParameterList | None):
        super().__init__()
        self.heads, self.sub_keys, self.top_k = (
            memory[name] for name in ('heads', 'sub_keys', 'top_k'))
        half = memory['query_width'] // 2
        value_width = memory['value_width'] or width
        self.query = nn.Linear(width, self.heads * 2 * half)
        self.query_norm = (nn.Identity() if memory['query_norm'] == 'none'
                           else QueryNorm(memory['query_norm'], (self.heads, 2, half)))
        self.codebooks = nn.Parameter(
            torch.empty(self.heads, 2, self.sub_keys, half).uniform_(-half ** -.5, half ** -.5))
        if shared is None:
            self.values = nn.ParameterList(
                torch.randn(rows, value_width) * value_width ** -.5
                for rows in memory['table_rows'])
        self.table = [self.values if shared is None else shared]  # in a list: not registered twice
        self.output = (nn.Identity() if value_width == width
                       else nn.Linear(value_width, width, bias=False))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        query = self.query(states.flatten(0, -2)).unflatten(-1, (self.heads, 2, -1))
        scores, slots = self.best_slots(self.query_norm(query))
        read = self.read(slots.flatten(1), scores.softmax(-1).flatten(1))
        return self.output(read.to(states.dtype)).view_as(states)

    def best_slots(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and slots, [T, H, K]; the best pairs are among the K best of each half."""
        scores = torch.einsum('thpd,hpnd->thpn', query, self.codebooks).float()
        best, sub_keys = scores.topk(self.top_k)
        pairs = best[:, :, 0, :, None] + best[:, :, 1, None]
        slots = sub_keys[:, :, 0, :, None] * self.sub_keys + sub_keys[:, :, 1, None]
        top, places = pairs.flatten(-2).topk(self.top_k)
        return top, slots.flatten(-2).gather(-1, places)

    def read(self, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums of value rows, [T, V]."""
        read, start = 0, 0
        for block in self.table[0]:
            inside = (slots >= start) & (slots < start + len(block))
            read = read + F.embedding_bag(
                torch.where(inside, slots - start, 0), block, mode='sum',
                per_sample_weights=torch.where(inside, weights, 0).to(block.dtype))
            start += len(block)
        return read


class PkmBertLayer(BertLayer):
    """A BERT block with a memory beside its feed-forward network, or in its place."""

    def __init__(self, config: PkmBertConfig, shared: nn.ParameterList | None):
        super().__init__(config)
        if config.memory['placement'] == 'replace':
            self.intermediate = self.output.dense = None
        self.memory = ProductKeyMemory(config.hidden_size, config.memory, shared)
        self.memory_scale = nn.Parameter(torch.zeros(())) if config.memory['zero_start'] else 1

    def feed_forward_chunk(self, states: torch.Tensor) -> torch.Tensor:
        total = states + self.memory_scale * self.memory(states)
        if self.intermediate is not None:
            total = total + self.output.dropout(self.output.dense(self.intermediate(states)))
        return self.output.LayerNorm(total)


def add_memories(bert: BertModel) -> None:
    """Puts blocks with memories in the place of the plain ones."""
    memory, shared = bert.config.memory, None
    for index in sorted(memory['layers']):
        layer = bert.encoder.layer[index] = PkmBertLayer(bert.config, shared)
        if memory['shared_values']:
            shared = layer.memory.table[0]


class PkmBertModel(BertModel):
    config_class = PkmBertConfig

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config, add_pooling_layer)
        add_memories(self)
        self.post_init()


class PkmBertForMaskedLM(BertForMaskedLM):
    config_class = PkmBertConfig

    def __init__(self, config):
        super().__init__(config)
        add_memories(self.bert)
        self.post_init()


class PkmBertForPreTraining(BertForPreTraining):
    config_class = PkmBertConfig

    def __init__(self, config):
        super().__init__(config)
        add_memories(self.bert)
        self.post_init()


class PkmBertForSequenceClassification(BertForSequenceClassification):
    config_class = PkmBertConfig

    def __init__(self, config):
        super().__init__(config)
        add_memories(self.bert)
        self.post_init()


class PkmBertForQuestionAnswering(BertForQuestionAnswering):
    config_class = PkmBertConfig

    def __init__(self, config):
        super().__init__(config)
        add_memories(self.bert)
        self.post_init()


class PkmBertForTokenClassification(BertForTokenClassification):
    config_class = PkmBertConfig

    def __init__(self, config):
        super().__init__(config)
        add_memories(self.bert)
        self.post_init()
