"""How adapters start: every method of `LoraConfig.init_lora_weights`.

| method | A, B | frozen weight |
|---|---|---|
| True, "gaussian", False, "orthogonal" | random | stays |
| "eva" | directions of the inputs that vary most, and zero | stays |
| "pissa", "pissa_niter_N", "olora", "corda", "lora_ga" | a part of the weight | `W - scaling * B A` |
| "loftq" | what quantisation loses | the dequantised weight |
"""

from .choose import PLAIN_INITS, check_no_calibration, initial_adapters
from .conversion import as_saved, initial_for_file, saved_config
from .eva import with_found_ranks
from .target import Initial, features

__all__ = [
    "PLAIN_INITS",
    "Initial",
    "as_saved",
    "check_no_calibration",
    "features",
    "initial_adapters",
    "initial_for_file",
    "saved_config",
    "with_found_ranks",
]
