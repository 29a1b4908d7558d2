"""Large product-key memories in pretrained language models (Kim & Jung, 2020), in JAX and Flax."""

from pkm_jax.memory.embedding_bag import embedding_bag
from pkm_jax.memory.layer import MemoryConfig, MemoryReads, ProductKeyMemory
from pkm_jax.memory.product_keys import top_k_product_keys
from pkm_jax.memory.sharded import no_delta, sparse_embedding_bag
from pkm_jax.memory.sparse_rows import SparseRows, Touched
from pkm_jax.memory.usage import SlotCounts, count_slots, no_counts, usage_metrics
from pkm_jax.mesh import Axes, Shards, make_mesh
from pkm_jax.optimizers.sparse import (
    apply_updates,
    lazy_adam,
    rowwise_adagrad,
    rowwise_adam,
    sparse_sgd,
)
from pkm_jax.refusal import Refusal

__all__ = [
    'Axes', 'MemoryConfig', 'MemoryReads', 'ProductKeyMemory', 'Refusal', 'Shards', 'SlotCounts',
    'SparseRows', 'Touched', 'apply_updates', 'count_slots', 'embedding_bag', 'lazy_adam',
    'make_mesh', 'no_counts', 'no_delta', 'rowwise_adagrad', 'rowwise_adam',
    'sparse_embedding_bag', 'sparse_sgd', 'top_k_product_keys', 'usage_metrics',
]
