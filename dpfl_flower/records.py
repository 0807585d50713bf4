"""Names of the records and keys that travel in Flower messages."""

from typing import Final

ARRAYS: Final = "arrays"
METRICS: Final = "metrics"
CONFIG: Final = "config"
PRIVACY: Final = "privacy"

NUM_EXAMPLES: Final = "num-examples"
SERVER_ROUND: Final = "server-round"
