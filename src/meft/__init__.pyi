"""What the root exports, and from where: read by type checkers, and by `meft.lazy` when a name is first used."""

from meft import errors as errors
from meft.backbone.conversion import make_reversible as make_reversible
from meft.backbone.conversion import restore as restore
from meft.backbone.report import StackReport as StackReport
from meft.errors import MeftError as MeftError
from meft.integrations.callbacks import MeftCallback as MeftCallback
from meft.integrations.reversible import ReversibleCallback as ReversibleCallback
from meft.loading.folders import load as load
from meft.memory import MemoryEstimate as MemoryEstimate
from meft.memory import MemoryReport as MemoryReport
from meft.memory import estimate as estimate
from meft.memory import measure as measure
from meft.training.export import export as export
from meft.tuner import MeftConfig as MeftConfig
from meft.tuner import MeftLayer as MeftLayer
from meft.tuner import MeftModel as MeftModel
from meft.verification import VerifyReport as VerifyReport
from meft.verification import verify as verify
from meft.verification.coverage import report as report

__version__: str
