"""Choosing among candidates: several samples are drawn for an image, and a critic says which of them to show."""

from ecar.refine.critic import Critic, accepts, choose, levels_of, load_critic
from ecar.refine.fit import Fit, fit_critic

__all__ = ["Critic", "Fit", "accepts", "choose", "fit_critic", "levels_of", "load_critic"]
