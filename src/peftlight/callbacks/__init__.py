"""What is added to every run, and what can be added to one."""

from peftlight.callbacks.predictions import PredictionWriter, ShowPredictions
from peftlight.callbacks.progress import Progress
from peftlight.callbacks.quantize import Quantize
from peftlight.callbacks.run_record import RunRecord

__all__ = ["PredictionWriter", "Progress", "Quantize", "RunRecord", "ShowPredictions"]
