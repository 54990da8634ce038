"""Flow matching: interpolants between noise and data, and the objectives that training minimises."""

from sit_atconv.flow.flow_matching import Draw, FlowMatching
from sit_atconv.flow.interpolants import Interpolant, as_velocity, get_interpolant
from sit_atconv.flow.mean_flow import MeanFlow
from sit_atconv.flow.objective import Objective, as_trained

__all__ = [
    "Draw",
    "FlowMatching",
    "Interpolant",
    "MeanFlow",
    "Objective",
    "as_trained",
    "as_velocity",
    "get_interpolant",
]
