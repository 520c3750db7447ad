"""What is added to every run, and what can be added to one."""

from peftlight.callbacks.checkpoints import Checkpoints
from peftlight.callbacks.first_steps import FirstSteps
from peftlight.callbacks.predictions import PredictionWriter, ShowPredictions
from peftlight.callbacks.progress import Progress
from peftlight.callbacks.quantize import Quantize
from peftlight.callbacks.run_record import RunRecord
from peftlight.callbacks.stopping import Stopping
from peftlight.divergence import Guard

__all__ = [
    "Checkpoints",
    "FirstSteps",
    "Guard",
    "PredictionWriter",
    "Progress",
    "Quantize",
    "RunRecord",
    "ShowPredictions",
    "Stopping",
]
