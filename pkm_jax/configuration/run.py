"""A training run, typed and checked: what everything after the command line reads.

`resolve.py` makes it of a configuration; a program of one's own can make it directly, also with a
model and a task that no configuration names.
"""

import dataclasses
from pathlib import Path

from pkm_jax.fields import check_settings, setting
from pkm_jax.models.interface import ModelConfig
from pkm_jax.optimizers.build import OptimizerConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.interface import Task


@dataclasses.dataclass(frozen=True)
class Parts:
    """How many parts a value table is split into; 0 is chosen, and the log says why."""
    rows: int = setting(0, 'parts by rows; 0: chosen', least=0)
    columns: int = setting(0, 'parts by columns; 0: chosen', least=0)

    def __post_init__(self) -> None:
        check_settings(self, 'memory.shards')


@dataclasses.dataclass(frozen=True)
class Tables:
    """How value tables are updated, watched and split."""
    updates: str = setting('auto', "'dense', 'sparse' (rows read alone), or 'auto', which says why",
                           choices=('auto', 'dense', 'sparse'))
    dead_after: int = setting(0, 'steps unread until a slot is dead; 0: not tracked', least=0)
    drift_tokens: int = setting(
        0, 'of the validation text, by which the drift of slots is measured at every evaluation; '
        'their scores are kept in FOLDER/scores; 0: none', least=0)
    shards: Parts = Parts()

    def __post_init__(self) -> None:
        check_settings(self, 'memory')
        if self.drift_tokens and not self.dead_after:
            raise Refusal(f'memory.drift_tokens = {self.drift_tokens}, but memory.dead_after = 0: '
                          f'drift is counted since a slot was last read, which is not tracked '
                          f'then. Set memory.dead_after.')


@dataclasses.dataclass(frozen=True)
class Train(OptimizerConfig):
    """Steps, batches and the optimizer."""
    steps: int = setting(500_000, 'updates of the parameters', least=1)
    batch: int = setting(1024, 'examples of a step, over all devices', least=1)
    gradient_accumulation_steps: int = setting(
        1, 'micro-batches that a batch is computed in, one after the other: less memory', least=1)
    fsdp: bool = setting(False, 'fully sharded data parallelism: the backbone and its optimizer '
                                'state split over the replicas of tables; less memory, more '
                                'traffic')
    max_skipped_steps: int = setting(
        10, 'the run stops after so many steps in a row that were skipped, as loss or gradient '
        'were not finite', least=1)
    best: str = setting('', "metric of the evaluations by which the best weights are kept in "
                            "FOLDER/best; '': none are")
    patience: int = setting(0, 'evaluations without better ones after which training stops; 0: '
                               'never', least=0)

    def __post_init__(self) -> None:
        check_settings(self, 'train')
        if self.patience and not self.best:
            raise Refusal(f"train.patience = {self.patience}, but train.best = '': name the metric "
                          f"that has to get better, such as 'loss'.")
        if self.batch % self.gradient_accumulation_steps:
            raise Refusal(f'train.batch = {self.batch} does not divide into '
                          f'train.gradient_accumulation_steps = {self.gradient_accumulation_steps} '
                          f'micro-batches.')
        if self.warmup >= self.steps:
            raise Refusal(f'train.warmup = {self.warmup} must be less than train.steps = '
                          f'{self.steps}.')

    @property
    def micro_batch(self) -> int:
        """Examples that are computed at a time."""
        return self.batch // self.gradient_accumulation_steps


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Several processes that train as one; addresses are found on TPU pods, Slurm and the like."""
    enabled: bool = setting(False, 'True: one of several processes, started alike')
    coordinator: str = setting('', "host:port of the first; '': found")
    processes: int = setting(0, 'how many; 0: found', least=0)
    process: int = setting(-1, 'which one this is; -1: found', least=-1)
    initialization_timeout: int = setting(
        300, 'seconds in which all processes must have begun; else those that did end', least=1)
    heartbeat_timeout: int = setting(
        30, 'seconds without a sign of life after which a process is taken for dead: the others '
        'end', least=2)

    def __post_init__(self) -> None:
        check_settings(self, 'distributed')


@dataclasses.dataclass(frozen=True)
class Log:
    """What a run writes, and how often; may change when it resumes."""
    every: int = setting(100, 'steps between lines of metrics', least=1)
    norms_every: int = setting(
        100, 'steps between norms of update and parameters by group, which take 3 to 7 % of a step '
        'of BERT-base on an H100; 0 (never) and 1 compile one program of the step, others two',
        least=0)
    eval_every: int = setting(5_000, 'steps between evaluations', least=1)
    eval_at_start: bool = setting(False, 'evaluate before the first step too')
    eval_batches: int = setting(50, 'of train.batch examples, always the same', least=1)
    checkpoint_every: int = setting(5_000, 'steps between checkpoints', least=1)
    keep: int = setting(3, 'newest checkpoints that are kept', least=1)
    hang_exit: bool = setting(
        False, 'end a process that makes no progress, with exit status 4, after it has said where '
        'it stands')
    profile: tuple[int, int] = setting((0, 0), 'first and last step of a profiler trace; 0: none')

    def __post_init__(self) -> None:
        check_settings(self, 'log')


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Raises:
      Refusal: settings that do not go together; the message names them.
    """
    model: ModelConfig
    task: Task
    name: str = setting('', 'shown with the progress')
    workdir: str = setting('runs/run', 'everything that the run writes; starting again resumes it')
    init_from: str = setting('', "a run, checkpoint or Hugging Face folder; '': from scratch")
    seed: int = setting(0, "of weights, dropout, masks and the data's order", least=0,
                        most=2 ** 32 - 1)
    compilation_cache: str = setting(
        'data/compiled', "where compiled programs are kept, for the next start; '': nowhere")
    tables: Tables = Tables()
    train: Train = Train()
    distributed: Distributed = Distributed()
    log: Log = Log()

    def __post_init__(self) -> None:
        check_settings(self)
        self.task.check(self.model)
        first, last = self.log.profile
        if (first, last) != (0, 0) and not 1 <= first <= last <= self.train.steps:
            raise Refusal(f'log.profile = {(first, last)} must be (0, 0), or a first and a last '
                          f'step within 1..{self.train.steps}.')
        if '://' in self.workdir:
            raise Refusal(f'workdir = {self.workdir!r}: runs are written to folders; mount the '
                          f'bucket and give its path.')

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.workdir)

    @property
    def tokens_per_step(self) -> int:
        """Of a batch of the longest examples, padding included."""
        return self.train.batch * self.task.length

    @property
    def flops_per_step(self) -> int:
        """`flops_of` a batch of the longest examples."""
        return self.flops_of(self.task.length)

    def flops_of(self, length: int) -> int:
        """Matrix products of a step on examples padded to `length`: forward, and twice as much
        backward."""
        return 3 * self.train.batch * self.model.forward_flops(length, self.task.predictions())

    def with_vocabulary(self, words: int) -> 'Run':
        """The same with a model for that many words."""
        return dataclasses.replace(self, model=self.model.with_vocabulary(words))
