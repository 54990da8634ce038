"""Sampling: guidance turns a model into a velocity, a solver carries noise along it, a stream seeds every sample.

Solvers take any callable velocity(x, t); nothing in here knows a model.
"""

from sit_atconv.runtime.lazy import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__, guidance="GUIDANCE Guidance branches guidance_schedule guided", ode="sample_ode", sde="sample_sde",
    sampler="Counted Sampler", solvers="SOLVERS Solver default_solver", stream="SampleStream", times="time_grid",
)
