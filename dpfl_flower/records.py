"""Names of the records and keys that travel in Flower messages."""

from typing import Final

ARRAYS: Final = "arrays"
METRICS: Final = "metrics"
CONFIG: Final = "config"
PRIVACY: Final = "privacy"
PROPERTIES: Final = "properties"

NUM_EXAMPLES: Final = "num-examples"
LOSS: Final = "loss"
SERVER_ROUND: Final = "server-round"

# A node of many users: what it is asked in a ConfigRecord, what it answers in an ArrayRecord.
COHORT: Final = "cohort"
INTEGER_SUM: Final = "integer-sum"
SUM: Final = "sum"
# A node that adds a share of the noise: what it is asked in a ConfigRecord.
DISTRIBUTED: Final = "distributed"
# A node that adds all of the noise: what it is asked in a ConfigRecord.
LOCAL: Final = "local"

# Keys of a node's own config (``flower-supernode --node-config``).
LEDGER_PATH: Final = "ledger-path"
MIN_NOISE_MULTIPLIER: Final = "min-noise-multiplier"
MAX_EPSILON: Final = "max-epsilon"
MAX_DELTA: Final = "max-delta"
ALLOW_DEVICE_NOISE: Final = "allow-device-noise"
MIN_SHARE_MULTIPLIER: Final = "min-share-multiplier"
MAX_ROUNDS: Final = "max-rounds"

# A key of a run's state at a node: the clip norm that released counts have led to.
CLIP_NORM: Final = "dpfl-flower.clip-norm"

# Secure aggregation: what travels in a ConfigRecord, the masked vector in an ArrayRecord, and what
# a node keeps of the round in its state. What is asked for, an update or a part of a weighted mean,
# is a ConfigRecord of its own.
SECAGG: Final = "secagg"
MASKED: Final = "masked"
UPDATE: Final = "update"
AVERAGE: Final = "average"
SECAGG_STATE: Final = "dpfl-flower.secagg.state"
SECAGG_PROGRESS: Final = "dpfl-flower.secagg.progress"
SECAGG_MIN_COHORT: Final = "secagg-min-cohort"
SECAGG_COLLUDERS: Final = "secagg-colluders"
SECAGG_IDENTITY: Final = "secagg-identity"
SECAGG_ROSTER: Final = "secagg-roster"
SECAGG_JOURNAL: Final = "secagg-journal"

# Secure aggregation by CKKS: the node's own config, and what it keeps of the round in its state.
CKKS_KEY: Final = "ckks-key"
CKKS_STATE: Final = "dpfl-flower.ckks.state"
