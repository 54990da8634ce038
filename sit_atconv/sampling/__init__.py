"""Sampling: guidance turns a model into a velocity, a solver carries noise along it, a stream seeds every sample.

Solvers take any callable velocity(x, t); nothing in here knows a model.
"""

from sit_atconv.sampling.guidance import guidance_schedule, guided
from sit_atconv.sampling.ode import SOLVERS, sample_ode
from sit_atconv.sampling.sampler import Counted, Sampler, default_solver
from sit_atconv.sampling.sde import SDE_SOLVERS, sample_sde
from sit_atconv.sampling.stream import SampleStream
from sit_atconv.sampling.times import time_grid

__all__ = ["SDE_SOLVERS", "SOLVERS", "Counted", "SampleStream", "Sampler", "default_solver", "guidance_schedule",
           "guided", "sample_ode", "sample_sde", "time_grid"]
