"""Writes goldens/sparse_adam.npz, steps of torch.optim.SparseAdam, once.

    pip install torch==2.13.0
    python tests/optimizers/make_sparse_adam.py
"""

from pathlib import Path

import numpy as np
import torch

STEPS, SLOTS, WIDTH = 6, 12, 5
SETTINGS = dict(lr=0.02, betas=(0.9, 0.99), eps=1e-3)

if __name__ == '__main__':
    rng = np.random.default_rng(0)
    table = torch.nn.Parameter(torch.tensor(rng.normal(size=(SLOTS, WIDTH)), dtype=torch.float32))
    optimizer = torch.optim.SparseAdam([table], **SETTINGS)
    kept = {'start': table.detach().numpy().copy()}
    for step in range(STEPS):
        ids = np.sort(rng.choice(SLOTS - 2, size=1 + step % 4, replace=False))
        rows = rng.normal(size=(len(ids), WIDTH)).astype(np.float32)
        table.grad = torch.sparse_coo_tensor(torch.tensor(ids[None]), torch.tensor(rows),
                                             table.shape)
        optimizer.step()
        state = optimizer.state[table]
        kept |= {f'ids{step}': ids.astype(np.int32), f'rows{step}': rows,
                 f'table{step}': table.detach().numpy().copy(),
                 f'first{step}': state['exp_avg'].numpy().copy(),
                 f'second{step}': state['exp_avg_sq'].numpy().copy()}
    folder = Path(__file__).parent / 'goldens'
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / 'sparse_adam.npz', **kept)
