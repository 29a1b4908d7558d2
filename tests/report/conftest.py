import pytest

from pkm_jax.report.report import write_report
from tests.report.synthetic_runs import make_quickstart


@pytest.fixture(scope='session')
def quickstart(tmp_path_factory):
    return make_quickstart(tmp_path_factory.mktemp('work') / 'quickstart')


@pytest.fixture(scope='session')
def page(quickstart):
    return write_report(quickstart).read_text()


@pytest.fixture
def small(tmp_path):
    return make_quickstart(tmp_path / 'small', tokens=256, side=12)
