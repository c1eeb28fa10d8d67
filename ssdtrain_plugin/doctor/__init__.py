"""What ``ssdtrain doctor`` finds out: can a directory hold activations, how fast, and what is in the way.

It writes and reads through the same tier as training does, so its figures are those
that training will see. It needs no root. It prints nothing; :mod:`ssdtrain_plugin.cli` does.
"""

from ssdtrain_plugin.doctor.diagnosis import Diagnosis, examine
from ssdtrain_plugin.doctor.findings import Finding
from ssdtrain_plugin.doctor.machine import examine_machine
from ssdtrain_plugin.doctor.measurement import EXTENT_BYTES, Bandwidth
from ssdtrain_plugin.doctor.prediction import ModelShape, Prediction, predict

__all__ = [
    "EXTENT_BYTES",
    "Bandwidth",
    "Diagnosis",
    "Finding",
    "ModelShape",
    "Prediction",
    "examine",
    "examine_machine",
    "predict",
]
