"""Metrics of predictions, by scikit-learn and SciPy. Where one is not defined it is 0.

Both are imported where they are needed: they take long, and pretraining starts without them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


def of_classes(
    labels: Int[np.ndarray, 'n'], guesses: Int[np.ndarray, 'n'],
) -> dict[str, float]:
    """accuracy, macro F1 over the classes that occur, Matthews' correlation; f1 of the second of
    two classes, as GLUE counts it."""
    from sklearn import metrics
    found = {
        'accuracy': metrics.accuracy_score(labels, guesses),
        'macro_f1': metrics.f1_score(labels, guesses, average='macro', zero_division=0),
        'matthews_correlation': metrics.matthews_corrcoef(labels, guesses)}
    if max(labels.max(), guesses.max()) <= 1:
        found['f1'] = metrics.f1_score(labels, guesses, zero_division=0)
    return {name: float(value) for name, value in found.items()}


def of_label_sets(
    labels: Bool[np.ndarray, 'n classes'], guesses: Bool[np.ndarray, 'n classes'],
) -> dict[str, float]:
    """micro and macro F1, and the share of examples all of whose labels are right."""
    from sklearn import metrics
    return {'micro_f1': float(metrics.f1_score(labels, guesses, average='micro', zero_division=0)),
            'macro_f1': float(metrics.f1_score(labels, guesses, average='macro', zero_division=0)),
            'exact_match': float(np.mean(np.all(labels == guesses, axis=1)))}


def of_numbers(
    labels: Float[np.ndarray, 'n'], guesses: Float[np.ndarray, 'n'],
) -> dict[str, float]:
    """Pearson's r, Spearman's ρ and the root mean square error."""
    from scipy import stats
    varied = len(labels) > 1 and np.ptp(labels) > 0 and np.ptp(guesses) > 0
    return {'pearson': float(stats.pearsonr(labels, guesses).statistic) if varied else 0.,
            'spearmanr': float(stats.spearmanr(labels, guesses).statistic) if varied else 0.,
            'rmse': float(np.sqrt(np.mean((labels - guesses) ** 2)))}


def combined(values: dict[str, float], names: Sequence[str]) -> float:
    """The mean of some of the metrics."""
    return float(np.mean([values[name] for name in names]))
