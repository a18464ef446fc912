"""The component that diffusers loads for ``pipeline.py``; the weights are in the folder above."""

from ecar.hub.diffusers import EcarModel as EcarModel
