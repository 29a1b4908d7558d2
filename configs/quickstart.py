r"""The paper in miniature, on a laptop: minutes on two CPU cores.

    make quickstart

Three runs of a small BERT on the documentation of the Python packages installed here: `pretrain`
learns without memory; `add` starts from its weights with a product-key memory beside a feed-forward
layer; `replace`, the contrast, learns from scratch with the memory in the feed-forward layer's
place, for as many steps. Then a report compares them: runs/quickstart/report/report.html.

Some six minutes on two idle cores. About: `pretrain` ends at a loss of 6.3, `add` at 6.2 with 95 %
top-1 usage, `replace` at 6.3 with 90 %; the text depends on what is installed (docs/results.md).
"""

from pkm_jax.configs import bert_base_pkm


def get_config():
    config = bert_base_pkm.get_config()
    config.workdir = 'runs/quickstart'
    config.model.update(layers=3, width=128, attention_heads=4, feed_forward_width=512,
                        max_length=64, dropout=0.0, attention_dropout=0.0, dtype='float32')
    config.memory.update(layers=(1,), sub_keys=64, top_k=8, query_width=64, dead_after=100)
    config.data.update(corpus='installed-docs', vocab_size=8192, length=64, max_predictions=10,
                       validation_fraction=0.03, workers=0)
    config.train.update(steps=300, batch=64, warmup=50, learning_rate=1e-3,
                        values_learning_rate=1e-2)
    config.log.update(every=5, norms_every=1, eval_every=60, eval_batches=8, checkpoint_every=150,
                      keep=2)
    nothing = dict(placement='none', layers=())
    config.runs.update(
        pretrain=dict(memory=nothing),
        add=dict(init_from='pretrain'),
        replace=dict(memory=dict(placement='replace')))
    return config
