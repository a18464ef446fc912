"""Choosing among candidates: several samples are drawn for an image, and a critic says which of them to show."""

from ecar.refine.best_of import BestOf, critic_of, identity
from ecar.refine.critic import Critic, accepts, choose, levels_of, load_critic
from ecar.refine.fit import Fit, fit_critic
from ecar.refine.make import make_critic

__all__ = [
    "BestOf",
    "Critic",
    "Fit",
    "accepts",
    "choose",
    "critic_of",
    "fit_critic",
    "identity",
    "levels_of",
    "load_critic",
    "make_critic",
]
