"""What can go wrong with a ledger.

>>> issubclass(BudgetExhausted, LedgerError)
True
"""


class LedgerError(RuntimeError):
    """A ledger cannot be used as asked; nothing was charged."""


class LedgerLocked(LedgerError):
    """Another process, or another object of this one, has the ledger open."""


class LedgerTampered(LedgerError):
    """A ledger was edited, truncated or rolled back."""


class BudgetExhausted(LedgerError):
    """A charge would exceed the budget; nothing was charged."""
