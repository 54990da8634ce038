"""Sampling: guidance turns a model into a velocity, a solver carries noise along it, a stream seeds every sample.

Solvers take any callable velocity(x, t); nothing in here knows a model.
"""

from sit_atconv.sampling.guidance import guided
from sit_atconv.sampling.ode import SOLVERS, sample_ode
from sit_atconv.sampling.stream import SampleStream

__all__ = ["SOLVERS", "SampleStream", "guided", "sample_ode"]
