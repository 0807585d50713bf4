"""Whom a guarantee protects, how two data sets may differ, and who is trusted with what.

>>> PrivacyUnit("node")
<PrivacyUnit.NODE: 'node'>
>>> Relation("replace-one")
<Relation.REPLACE_ONE: 'replace-one'>
"""

from enum import StrEnum


class PrivacyUnit(StrEnum):
    """What one neighbouring data set adds, removes or changes."""

    NODE = "node"
    """A whole SuperNode with everything on it."""
    USER = "user"
    """One of many people inside a node, with all of their records."""
    EXAMPLE = "example"
    """One record."""


class Relation(StrEnum):
    """How two neighbouring data sets differ in one unit."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    REPLACE_ONE = "replace-one"
    ZERO_OUT = "zero-out"
    """The unit stays in place, and contributes zeros."""


class TrustModel(StrEnum):
    """Who sees what before noise is added."""

    CENTRAL = "central"
    """The server sees raw updates and adds the noise."""
    SECURE = "secure"
    """The server sees only the sum, then adds the noise."""
    DISTRIBUTED = "distributed"
    """Every node adds a share of the noise before secure aggregation."""
    LOCAL = "local"
    """Every node adds all of its own noise."""
