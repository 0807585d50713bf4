"""What progress lines tell of epsilon."""

from dpfl_flower.accounting import Ledger, PoissonSampled
from dpfl_flower.accounting.events import Gaussian
from dpfl_strategies.run_report import spent_so_far


def opened(path):
    return Ledger.open(path / "ledger.jsonl", dataset="heart", delta=1e-5, unit="user")


def test_the_last_round_tells_what_the_ledger_says_and_those_before_it_no_less(tmp_path):
    with opened(tmp_path) as ledger:
        ledger.plan("model", PoissonSampled(0.01, Gaussian(1.0)), 1000, max_charge=1000)
        ledger.charge("model", count=1000)
        before = spent_so_far(ledger, 9, 10)
        last = spent_so_far(ledger, 10, 10)
        assert last == ledger.epsilon()
        assert last < before <= last * 1.001  # a coarser grid was used
