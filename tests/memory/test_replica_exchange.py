"""What replicas exchange, by hand."""

from pkm_jax.memory.replica_exchange import replica_exchange
from pkm_jax.mesh import Shards


def test_the_cheaper_exchange_by_hand():
    """2 replicas of 4 × 8: each receives 5 tokens of 3 reads, or the rows they can touch."""
    few = replica_exchange(Shards(data=2), 10, 3, 4, 8, 4, 2)
    assert few.bytes == {'tokens': 5 * 8 * 4 + 15 * 6, 'rows': 4 * 9 * 4 + 15 * 4}
    assert few.what == 'rows'
    many = replica_exchange(Shards(data=2), 10, 3, 64, 8, 4, 2)
    assert many.bytes['rows'] == 15 * 9 * 4 + 15 * 4 and many.what == 'tokens'
