"""Sampling: guidance makes a velocity of a model, a solver integrates it, a stream seeds each sample.

Solvers take any callable velocity(x, t) and know nothing of models.
"""

from sit_atconv.runtime.lazy import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    guidance="GUIDANCE Guidance branches guidance_schedule guided",
    ode="sample_ode",
    sde="sample_sde",
    sampler="Counted Sampler Watch",
    solvers="SOLVERS Solver default_solver",
    stream="SampleStream",
    times="time_grid",
)
