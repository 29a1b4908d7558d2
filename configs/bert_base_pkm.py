r"""BERT-base with two product-key memories beside its feed-forward layers: the paper's recipe.

    python -m pkm_jax.pretrain --config=configs/bert_base_pkm.py \
        --config.data.corpus='/corpora/wikipedia/*.jsonl.xz' --config.data.vocab=/bert/vocab.txt \
        --config.init_from=/runs/bert_base

Kim & Jung 2020: BERT-base, memories of 512² slots, 4 heads of 32 reads, batches of 1,024 sequences,
500k steps, Adam at 1e-4 and 1e-3 for the values, starting from a BERT pretrained without memory.
That is 262 billion tokens: about a week on one H200, at the 470,000 tokens/s of docs/results.md,
which were measured with 32 sequences a step and --config.model.attention_dropout=0; one device
needs --config.train.accumulate=32 for as many as these.
Every other configuration starts from this one; every field can be set on the command line.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(sort_keys=False)
    config.workdir = 'runs/bert_base_pkm'   # everything a run writes; starting again resumes it
    config.init_from = ''                   # a run, checkpoint or Hugging Face folder; '': scratch
    config.seed = 0                         # of weights, dropout, masking and the data's order
    config.runs = ml_collections.ConfigDict(sort_keys=False)    # {name: changes}: runs in turn

    config.model = ml_collections.ConfigDict(sort_keys=False)
    config.model.layers = 12
    config.model.width = 768                # D
    config.model.attention_heads = 12
    config.model.feed_forward_width = 3072
    config.model.max_length = 512           # learnt positions
    config.model.vocab_size = 0             # rows of the word embedding; 0: one for each word
    config.model.segments = 2
    config.model.tied = True                # the MLM head predicts with the word embedding
    config.model.norm_epsilon = 1e-12
    config.model.dropout = 0.1
    config.model.attention_dropout = 0.1    # 0 makes attention fused on GPUs: faster
    config.model.dtype = 'bfloat16'         # of the computation; parameters are float32
    config.model.remat = False              # True: less memory, about a third more time

    config.memory = ml_collections.ConfigDict(sort_keys=False)
    config.memory.placement = 'add'         # 'add', 'replace' or 'none'
    config.memory.layers = (4, 8)           # 0-based; the paper's choice is not published
    config.memory.sub_keys = 512            # N: 512² slots
    config.memory.heads = 4                 # H
    config.memory.top_k = 32                # K reads per head
    config.memory.query_width = 512         # Q, both halves
    config.memory.value_width = 0           # V; 0: the width of the model
    config.memory.query_norm = 'batch'      # 'batch', 'layer' or 'none'
    config.memory.input_dropout = 0.0
    config.memory.query_dropout = 0.0
    config.memory.value_dropout = 0.0
    config.memory.zero_start = False        # True: step 0 equals the model without memory
    config.memory.shared_values = False     # True: one value table for all memory layers
    config.memory.dead_after = 0            # steps unread until a slot is dead; 0: not tracked
    config.memory.values_dtype = 'float32'  # or 'bfloat16', rounded stochastically: sparse only
    config.memory.weights_dtype = 'float32'     # of reads: 'bfloat16' halves what devices exchange
    config.memory.updates = 'auto'          # 'dense', 'sparse' (rows read alone), 'auto' says why
    config.memory.shards = ml_collections.ConfigDict(sort_keys=False)   # of each value table
    config.memory.shards.rows = 0           # parts by rows; 0: chosen, and logged why
    config.memory.shards.columns = 0        # parts by columns; 0: chosen, and logged why

    config.data = ml_collections.ConfigDict(sort_keys=False)
    config.data.corpus = ''                 # globs with ',' between, a prepared folder,
                                            # 'tfds:NAME' or 'installed-docs'
    config.data.vocab = ''                  # vocab.txt, tokenizer.json or their folder; '': train one
    config.data.vocab_size = 30522          # of a vocabulary that is trained
    config.data.cache = 'data'              # where prepared corpora go
    config.data.validation_fraction = 0.005
    config.data.length = 512                # L, tokens per sequence
    config.data.mask_rate = 0.15
    config.data.max_predictions = 80        # per sequence: at least what mask_rate masks
    config.data.whole_word = False          # mask whole words
    config.data.workers = 8                 # loader processes; 0: a thread. The stream is the same

    config.train = ml_collections.ConfigDict(sort_keys=False)
    config.train.steps = 500_000
    config.train.batch = 1024               # sequences per step, over all devices
    config.train.accumulate = 1             # parts that a batch is computed in: less memory
    config.train.learning_rate = 1e-4
    config.train.values_learning_rate = 1e-3
    config.train.values_optimizer = 'adam'  # or 'sgd'; if sparse 'rowwise_adam', 'rowwise_adagrad'
    config.train.warmup = 10_000            # steps; then linear decay to 0
    config.train.weight_decay = 0.01        # not on values, biases and norms
    config.train.beta1 = 0.9
    config.train.beta2 = 0.999
    config.train.epsilon = 1e-6
    config.train.split_backbone = False     # over the replicas of tables: less memory, more traffic
    config.train.clip = 1.0                 # global norm of the gradient; 0: no clipping

    config.distributed = ml_collections.ConfigDict(sort_keys=False)
    config.distributed.enabled = False      # True: one of several processes, started alike
    config.distributed.coordinator = ''     # host:port of the first; '': found (TPU pods, Slurm)
    config.distributed.processes = 0        # how many; 0: found
    config.distributed.process = -1         # which one this is; -1: found

    config.log = ml_collections.ConfigDict(sort_keys=False)     # may change when a run resumes
    config.log.every = 100                  # steps
    config.log.eval_every = 5_000           # steps
    config.log.eval_batches = 50            # of train.batch sequences, always the same
    config.log.checkpoint_every = 5_000     # steps
    config.log.keep = 3                     # checkpoints
    config.log.profile = (0, 0)             # first and last step of a profiler trace
    return config
