"""Large product-key memories inside pretrained language models (Kim & Jung, 2020), in JAX and Flax."""

from pkm_jax.memory.embedding_bag import embedding_bag
from pkm_jax.memory.layer import MemoryConfig, MemoryReads, ProductKeyMemory
from pkm_jax.memory.product_keys import top_k_product_keys
from pkm_jax.memory.sharded import sparse_embedding_bag
from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.memory.usage import SlotCounts, count_slots, no_counts, usage_metrics
from pkm_jax.mesh import Axes, Shards, make_mesh
from pkm_jax.refusal import Refusal

__all__ = [
    'Axes', 'MemoryConfig', 'MemoryReads', 'ProductKeyMemory', 'Refusal', 'Shards', 'SlotCounts',
    'SparseRows', 'count_slots', 'embedding_bag', 'make_mesh', 'no_counts', 'sparse_embedding_bag',
    'top_k_product_keys', 'usage_metrics',
]
