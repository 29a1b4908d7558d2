r"""The paper in miniature, on a laptop: minutes on two CPU cores.

    make quickstart

Five runs of a small BERT on a text that comes with the program, the messages of presidents to
Congress since 1910. `pretrain` learns without memory. Then all four cells of the paper's
comparison, for equally many steps: from scratch or from the weights of `pretrain`, with a
product-key memory in the place of a feed-forward layer (`replace`) or beside it (`add`). A report
compares them, runs/quickstart/report/report.html, and `pretrained_add` fills three masks.

Six to eight minutes on two idle cores, installation included. Loss and top-1 usage, one run each:
`pretrain` 5.05; `scratch_replace` 5.47, 59 %; `scratch_add` 5.48, 57 %; `pretrained_replace` 3.61,
85 %; `pretrained_add` 3.60, 88 % (docs/results.md).
"""

from pkm_jax.configs import bert_base_pkm


def get_config():
    config = bert_base_pkm.get_config()
    config.workdir = 'runs/quickstart'
    config.model.update(layers=2, width=128, attention_heads=4, feed_forward_width=256,
                        max_length=16, dropout=0.0, attention_dropout=0.0, dtype='float32')
    config.memory.update(layers=(1,), sub_keys=64, top_k=8, query_width=64, dead_after=100)
    config.data.update(corpus='state-of-the-union', vocab_size=1024, length=16, mask_rate=0.3,
                       max_predictions=5, validation_fraction=0.04, workers=0)
    config.train.update(steps=600, batch=64, warmup=50, optimizer='muon', learning_rate=4e-3,
                        values_learning_rate=1e-2)
    config.log.update(every=25, norms_every=0, eval_every=150, eval_batches=32,
                      checkpoint_every=1000, keep=1)
    config.runs.update(
        pretrain=dict(memory=dict(placement='none', layers=()), train=dict(steps=900)),
        **{f'{name}_{placement}': dict(init_from=start, memory=dict(placement=placement))
           for name, start in (('scratch', ''), ('pretrained', 'pretrain'))
           for placement in ('replace', 'add')})
    return config
