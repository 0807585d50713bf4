"""Secure aggregation: a server learns the sum of its nodes' integer vectors, and no single one.

The protocol is pure: `dpfl_flower.secagg.node` and `dpfl_flower.secagg.server` are functions from
states and messages to states and messages. `dpfl_flower.client.secure_aggregation_mod` puts it
into a ClientApp, the argument ``secure_aggregation=SecAggPlus()`` into a strategy. `CKKS` is a
second protocol, with `dpfl_flower.client.ckks_mod`, for nodes that share a key and trust each
other.
"""

from dpfl_flower.secagg.aggregation import SecureAggregation, SecureExchange, SumRequest
from dpfl_flower.secagg.ckks import CKKS
from dpfl_flower.secagg.errors import Refusal, Refused, RoundAbandoned
from dpfl_flower.secagg.lanes import encoding_of, encoding_without_wrap
from dpfl_flower.secagg.masked_grid import masked_grid
from dpfl_flower.secagg.modulus import bits_without_wrap, fewest_bits
from dpfl_flower.secagg.roster import Identity, Roster
from dpfl_flower.secagg.round_plan import SecureSum
from dpfl_flower.secagg.secagg_plus import SecAggPlus
from dpfl_flower.secagg.session import LONGEST_SECONDS, Session
from dpfl_flower.secagg.terms import terms_of

__all__ = [
    "CKKS",
    "LONGEST_SECONDS",
    "Identity",
    "Refusal",
    "Refused",
    "Roster",
    "RoundAbandoned",
    "SecAggPlus",
    "SecureAggregation",
    "SecureExchange",
    "SecureSum",
    "Session",
    "SumRequest",
    "bits_without_wrap",
    "encoding_of",
    "encoding_without_wrap",
    "fewest_bits",
    "masked_grid",
    "terms_of",
]
