"""Flow matching: the interpolants between noise and data, and the objectives that are regressed along them."""

from sit_atconv.flow.interpolants import Interpolant, as_velocity, get_interpolant
from sit_atconv.flow.objectives import Draw, FlowMatching

__all__ = ["Draw", "FlowMatching", "Interpolant", "as_velocity", "get_interpolant"]
