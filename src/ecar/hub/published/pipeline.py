"""Lets diffusers draw with this model: ``DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)``."""

try:
    from ecar.hub.diffusers import EcarPipeline as EcarPipeline
except ImportError as error:
    raise ImportError(
        "this model is computed by the Python package ecar, which cannot be imported here: install it as its README "
        f"says, or a newer version of it ({error})"
    ) from error
