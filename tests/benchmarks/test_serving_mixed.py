"""The edits that the benchmark sends are edits, and what it pays is that of the mix."""

from __future__ import annotations

import serving_mixed
from conftest import random_model, tiny_config
from ecar import Pipeline
from ecar.serving.config import Limits
from ecar.serving.edits import read_edit
from ecar.serving.schema import EditRequest
from ecar.tokenizers import PixelTokenizer


def test_a_form_of_the_benchmark_is_an_edit_for_the_server() -> None:
    pipe = Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1))
    for kind, strength in (("fill", 1.0), ("vary", serving_mixed.STRENGTH)):
        files = serving_mixed.Editor("nowhere:1", kind, (8, 12)).files
        body, content_type = serving_mixed.form({"prompt": "1", "n": "1", "seed": "7"}, files)
        fields, order = read_edit(content_type, body, EditRequest, pipe, Limits(), chooses=False)
        assert order.redraw is not None and order.redraw.strength == strength and fields.seed == 7


def test_an_edit_with_more_flops_raises_what_an_image_of_the_mix_costs() -> None:
    run = {"images": {"generation": 2, "fill": 1, "vary": 1}, "images_per_second": 2.0}
    found = serving_mixed.paid(run, {"generation": 1.0, "fill": 2.0, "vary": 0.5})
    assert found["gflop_per_image"] == 1.125 and found["gflops_per_second"] == 2.25
    gflop = serving_mixed.cost(Pipeline(random_model(tiny_config()), PixelTokenizer(factor=1)))
    assert gflop["vary"] < gflop["generation"] <= gflop["fill"]
