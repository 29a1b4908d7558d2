"""The page of a report: self-contained HTML with its figures, verdicts and table."""

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from pkm_jax.report.finetuned import finetuned, results_of, worst_errors
from pkm_jax.report.plots import figures
from pkm_jax.report.runs import RunRecord, read_runs, thousands
from pkm_jax.report.table import table
from pkm_jax.report.theme import DARK, LIGHT, style
from pkm_jax.report.verdict import Verdict, verdicts

CSS = Path(__file__).with_name('report.css')

CAPTIONS = {
    'loss': 'Loss against training tokens. A run that continues another starts where '
            'that one ended.',
    'score': 'The metric by which the best weights were kept, at every evaluation. Dashed: what '
             'one reaches who always says the commonest class of the training data.',
    'predictions': 'What the best weights say of the validation data. Of classes, darker is a '
                   'larger share of the row; of numbers, estimates are right on the dashed line.',
    'usage': 'Share of the slots in use after T evaluation tokens of the last evaluation. Usage '
             'grows with T: compare runs at the same T, and with the dashed line for uniform '
             'picks.',
    'usage_training': 'The same shares at every evaluation during training, counted from the step '
                      'at which the memory was there.',
    'slots': 'One pixel a slot, row and column its two sub-keys; the same colour scale for all '
             'runs. Above: any of the K reads of a head. Below: the best of them, which is what '
             'top-1 usage counts.',
    'crossed': 'The four cells of the comparison, one pixel a slot, row and column its two '
               'sub-keys; the same colour scale for all. A slot counts as used that is the best '
               'of a head for some token: top-1 usage.',
    'access': 'Slots of the last evaluation, sorted by use. Left, the share of all read weights '
              'that the most used slots hold together: the closer to the diagonal, the more '
              'evenly used. Right, how often each slot was read; a line ends where the slots '
              'begin that were never read.',
}

# (metric, definition, source)
DEFINITIONS = (
    ('T', 'real (not padded) tokens of the evaluation over which slots are counted', ''),
    ('top-1 usage',
     'share of the S slots that are some head’s best slot for at least one of the T tokens',
     'after Kim & Jung 2020; formula of this project'),
    ('top-K usage', 'share of the slots among the K reads of any head for at least one token',
     'Lample et al. 2019'),
    ('uniform picks',
     '1 − (1 − 1/S)^(T·H): the top-1 usage that H uniform random picks a token would reach. '
     'For top-K, K distinct picks a head: 1 − (1 − K/S)^(T·H)', 'this project'),
    ('KL', 'log S + Σ z log z in nats, z the share of a slot in all read weights; 0 where all '
     'slots are alike', 'Lample et al. 2019'),
    ('Gini', 'inequality of z: 0 where all slots are alike, near 1 where few hold everything',
     'Lample et al. 2019, code'),
    ('slots holding 50 / 90 / 99 %',
     'smallest share of the slots that together hold that much of z', 'Lample et al. 2019, code'),
    ('dead', 'share of the slots not selected during the last training steps', 'this project'),
    ('drift, outdated', 'for each slot, 1 − the correlation of its scores now with those when its '
     'value was last updated; outdated: above one half', 'this project'),
)


def write_report(folder: Path, runs: Sequence[str] | None = None) -> Path:
    """Writes folder/report/report.html and its PNGs from the runs in `folder`; returns the page.

    `runs` names the subfolders to report; None takes all, or the folder itself where it is a run.

    Raises:
      Refusal: there is nothing to report, or a file is not what a run writes.
    """
    folder = Path(folder)
    found = read_runs(folder, runs)
    target = folder / 'report'
    target.mkdir(exist_ok=True)
    for theme in (LIGHT, DARK):
        drawn = figures(found, theme)
        for name, figure in drawn.items():
            figure.savefig(target / f'{name}{theme.suffix}.png', dpi=160)
    page = target / 'report.html'
    page.write_text(
        _page(folder, found, {name: figure.get_figwidth() for name, figure in drawn.items()}),
        encoding='utf-8')
    return page


def _verdict(said: Verdict, runs: Sequence[RunRecord]) -> str:
    tone = {True: 'yes', False: 'no', None: 'unknown'}[said.holds]
    bars = ''.join(
        f'<span>{html.escape(run.name)}</span><div><i style="width:{share:.1%};background:'
        f'{style(runs.index(run))[0]}"></i></div><b>{share:.1%}</b>'
        for run, share in said.top1)
    note = f'<p>Top-1 usage over T = {thousands(said.eval_tokens)} evaluation tokens</p>'
    return f"""<section class="verdict {tone}"><p>Does memory added to pretrained weights use more
of its slots than memory in replacement, from scratch?</p>
<h2>{html.escape(said.title)}</h2>{f'{note}<div class="bars">{bars}</div>' if bars else ''}
<p>{html.escape(said.text)}</p></section>"""


def _figure(target: Path, name: str, inches: float) -> str:
    def data(file: Path) -> str:
        return 'data:image/png;base64,' + base64.b64encode(file.read_bytes()).decode('ascii')

    caption = CAPTIONS[name if name in CAPTIONS else name.partition('_')[0]]
    return ('<figure><picture><source media="(prefers-color-scheme: dark)" '
            f'srcset="{data(target / f"{name}_dark.png")}">'
            f'<img width="{inches * 100:.0f}" alt="{caption}" '
            f'src="{data(target / f"{name}.png")}"></picture>'
            f'<figcaption>{caption}</figcaption></figure>')


def _losses(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str, str]]:
    """Definitions of the losses that the runs have, each once, and of perplexity."""
    losses = {run.loss_name['name']: run.loss_name for run in runs if run.loss_name['meaning']}
    for name, loss in losses.items():
        unit = f', in {loss["unit"]}' if loss['unit'] else ''
        yield html.escape(name), html.escape(loss['meaning'] + unit), ''
    if any('perplexity' in run.evals[-1] for run in runs if run.evals):
        yield 'perplexity', 'exponential of the loss', ''


def _page(folder: Path, runs: Sequence[RunRecord], widths: dict[str, float]) -> str:
    notes = ''.join(f'<li><b>{html.escape(run.name)}</b>: {html.escape(note)}</li>'
                    for run in runs for note in run.notes)
    definitions = ''.join(
        f'<dt>{metric}</dt><dd>{meaning}{f" <span>[{source}]</span>" if source else ""}</dd>'
        for metric, meaning, source in (*DEFINITIONS, *_losses(runs)))
    title = html.escape(folder.resolve().name)
    images = ''.join(_figure(folder / 'report', *item) for item in widths.items())
    errors = ''.join(worst_errors(run) for _, run in finetuned(runs))
    # The finding is one of pretraining: it is no question where all runs were fine-tuned.
    pretrained = [run for run in runs if not results_of(run)]
    said = ''.join(_verdict(one, runs) for one in verdicts(runs)) if pretrained else ''
    if pretrained and not any(run.layers for run in runs):
        images += '<p>None of the runs has evaluated a memory, so there is no usage to show.</p>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: product-key memory report</title><style>{CSS.read_text()}</style></head><body><main>
<header><p>Product-key memory report</p><h1>{title}</h1></header>
{said}
{f'<ul class="notes">{notes}</ul>' if notes else ''}
{images}
{errors and f'<h2>Worst errors</h2>{errors}'}
<h2>Runs</h2>{table(runs)}
<h2>What the numbers mean</h2><dl>{definitions}</dl>
</main></body></html>
"""
