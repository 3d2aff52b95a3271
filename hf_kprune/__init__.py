"""Make a Hugging Face model smaller and faster in minutes, without retraining, and leave it a normal Hugging
Face model.

Importing this package lets `from_pretrained` load pruned checkpoints with the stock classes of transformers.
"""

from .arguments import KPruneArguments
from .budgets import BudgetWarning
from .callbacks import KPruneCallback
from .checkpoint.legacy import from_legacy
from .checkpoint.patches import install
from .comparison import Comparison, compare
from .entries import SublayerReport
from .errors import (
    ArgumentError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    KPruneError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
)
from .history import Recovery
from .methods import Method, Statistics, register_method
from .pruner import KPrunePruner
from .report import PruningReport
from .runtimes import export
from .structure.describe import describe
from .structure.families import Block, Stack, register_family
from .version import __version__


__all__ = [
    "ArgumentError",
    "Block",
    "BudgetError",
    "BudgetWarning",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "KPruneArguments",
    "KPruneCallback",
    "KPruneError",
    "KPrunePruner",
    "Method",
    "PruningReport",
    "Recovery",
    "Stack",
    "Statistics",
    "SublayerReport",
    "UnsupportedArchitectureError",
    "UnsupportedModelError",
    "__version__",
    "compare",
    "describe",
    "export",
    "from_legacy",
    "register_family",
    "register_method",
]

install()
