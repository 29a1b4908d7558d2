"""The page of an inspection: one HTML file with its style, script and data, without a network."""

import html
import json
from pathlib import Path

from pkm_jax.inspection.page_data import page_data
from pkm_jax.inspection.survey import Survey

HERE = Path(__file__).parent


def write_page(survey: Survey, path: Path, source: str, shown_slots: int) -> None:
    """Writes the page; `source` names the texts, `shown_slots` of each memory have details."""
    data = json.dumps(page_data(survey, source, shown_slots), ensure_ascii=False,
                      separators=(',', ':')).replace('<', '\\u003c')
    style, body, script = ((HERE / f'page.{kind}').read_text(encoding='utf-8')
                           for kind in ('css', 'html', 'js'))
    title = html.escape(survey.trained.title)
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}: slots and words</title><style>{style}</style></head><body>{body}'
        f'<script type="application/json" id="data">{data}</script>'
        f'<script>{script}</script></body></html>\n', encoding='utf-8')
